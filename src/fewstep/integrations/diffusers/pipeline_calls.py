"""A pipeline as a model, by its own calls: whatever its call can do, its sampler can be fitted to.

A call is the keyword arguments that a user types, and becomes a label: label ``k`` is the k-th call. How it is evaluated is `relay`'s.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.images import read_picture
from fewstep.models.formats.diffusers_law import NoiseLaw
from fewstep.models.identity import digest, parts
from fewstep.models.networks.calls import check_evaluating
from fewstep.runtime.artifact import named_path, parse_json, read_file
from fewstep.runtime.errors import FewstepError, ModelError, first_line
from fewstep.runtime.front_door import whole

if TYPE_CHECKING:
    from fewstep.integrations.diffusers.relay import Evaluation, Relay

__all__ = ["PipelineLoop", "checked_calls", "read_calls"]

ROUNDS = 64  # evaluations of one call, which then begins anew
PROBES = 4  # evaluations of the call that is tried first
OPEN = 4  # calls that wait for their next turn at once
TOGETHER = 4  # samples of one call that are evaluated together
SAME = 1e-4  # of an answer's size: what one evaluation may differ from another at the same state and time
SAME_TOGETHER = 1e-3  # the same for an evaluation among others, or by a call of other steps: other kernels, in float32
TAKEN = {  # arguments that are the relay's -> why
    "num_inference_steps": "how often and where the network is asked is what is learned",
    "timesteps": "how often and where the network is asked is what is learned",
    "sigmas": "how often and where the network is asked is what is learned",
    "latents": "the states are the learner's",
    "generator": "say seed, a whole number, for what a call draws beside its latents",
    "output_type": "samples are latents",
    "return_dict": "it changes nothing",
    "callback_on_step_end": "it would not see the steps of a sampler",
    "callback": "it would not see the steps of a sampler",
}


def checked_calls(pipe: Any, calls: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a diffusers pipeline, and what was passed
    """Return the calls of a pipeline, each as a dict of arguments that its class knows.

    Raises:
        ModelError: there are none, one is no dict, or has an argument that the pipeline does not know or that is not the caller's to say.
    """
    if isinstance(calls, Mapping):
        calls = [calls]
    if isinstance(calls, str | bytes) or not isinstance(calls, Sequence) or not calls:
        raise ModelError(f"calls are the arguments of the pipeline, as calls=[dict(prompt='a red cat')], got {str(calls)[:80]!r}")
    known = _parameters(pipe)
    for k, call in enumerate(calls):
        if not isinstance(call, Mapping) or not all(isinstance(key, str) for key in call):
            raise ModelError(f"call {k} is a dict of arguments, as dict(prompt='a red cat'), got {str(call)[:80]!r}")
        for key in call:
            if key in TAKEN:
                raise ModelError(f"call {k} says {key}, which is not a call's to say here: {TAKEN[key]}")
            if key != "seed" and (key not in known or key == "self"):
                raise ModelError(f"call {k} has the argument {key!r}, which a {type(pipe).__name__} does not know")
        whole(call.get("seed", 0), f"the seed of call {k}", ModelError)
    return [dict(call) for call in calls]


def read_calls(path: str | Path) -> list[dict[str, Any]]:
    """Return the calls in a file of JSON lines; where an argument is a picture (``image``, ``mask_image``), the text is the path to it.

    Raises:
        ModelError: a line is no JSON object, there is none, or a picture cannot be read.
    """
    path, calls = named_path(path), list[dict[str, Any]]()
    try:
        lines = read_file(path).decode("utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                calls.append({key: _picture(key, value, path.parent) for key, value in parse_json(line, f"{path}, line {number}").items()})
    except (FewstepError, UnicodeDecodeError) as error:
        raise ModelError(f'cannot read the calls in {path}: {error}; each line is a JSON object, as {{"prompt": "a red cat"}}') from error
    if not calls:
        raise ModelError(f"{path} has no calls: write one JSON object on each line, the arguments of the pipeline")
    return calls


def _picture(name: str, value: Any, folder: Path) -> Any:  # noqa: ANN401
    """Return the picture that a text names, or pictures, where the argument ``name`` takes some; else the value."""
    if "image" not in name or "embeds" in name or name.startswith("num_"):
        return value
    if isinstance(value, list):
        return [_picture(name, one, folder) for one in value]
    if not isinstance(value, str):
        return value
    from PIL import Image

    return Image.fromarray(read_picture(folder / value))


class PipelineLoop(nn.Module):
    """A pipeline's own loop as a network: the guided answers of its calls.

    Args:
        pipe: the pipeline, with its weights where and as they are used.
        calls: see `checked_calls`.

    Attributes:
        law: the noise law of the calls.
        shape: the shape ``*D`` of a state.
        dtype: that of the pipeline's states.

    Raises:
        ModelError: calls of several noise laws or shapes; a loop that cannot be led, starts from a picture, or answers otherwise at another
            of its steps.
    """

    law: NoiseLaw

    def __init__(self, pipe: Any, calls: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401 - a diffusers pipeline
        super().__init__()
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        for part in modules.values():
            check_evaluating(part)
        self.components = nn.ModuleDict(modules)
        settings = {key: value for key, value in pipe.config.items() if isinstance(value, bool | int | float)}
        about = digest(parts([type(pipe).__name__, settings, [_plain(call) for call in calls], *_guider(pipe)], "calls"))
        self.register_buffer("about", torch.tensor(list(about.encode()), dtype=torch.uint8))  # a part of the model's fingerprint
        self._pipe, self._calls = pipe, list(calls)
        self._open: dict[tuple[int, int], Relay] = {}
        weakref.finalize(self, _close, self._open)  # their threads end with the model, or with the process
        self._several = next((key for key in _parameters(pipe) if key == "batch_size" or _is_count(key)), None)
        self._encoded: dict[str, Any] = {}
        self._together: dict[int, int] = {}  # label -> samples that are evaluated together
        self._try_out()

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the guided answers ``[B, *D]`` at ``x [B, *D]`` and the network's own times ``[B]``, of the calls ``labels [B]``."""
        wanted = [0] * len(x) if labels is None else labels.tolist()
        answers = torch.empty_like(x)
        groups: dict[tuple[int, float], list[int]] = {}
        for i, key in enumerate(zip(wanted, time.tolist(), strict=True)):
            groups.setdefault(key, []).append(i)
        for (label, at), rows in groups.items():
            together = 1 if len(rows) == 1 else self._count_together(label)
            for start in range(0, len(rows), together):
                some = rows[start : start + together]
                states = torch.cat([x[some]] * self._copies)
                answers[some] = self._relay(label, len(some)).ask(states, at).output[: len(some)].to(x.dtype).to(x.device)
        return answers

    def start(self, label: int) -> Tensor:
        """Return the state ``[1, *D]`` that a call of the pipeline itself begins with, drawn by the ``seed`` in the call."""
        relay, first = self._begun(label, 1, ROUNDS)
        relay.close()
        return first.x[:1]

    def close(self) -> None:
        """End all calls that wait for their next turn."""
        _close(self._open)

    def _relay(self, label: int, count: int) -> Relay:
        """Return a call of ``count`` samples that has an evaluation left; it waits for its next turn, or begins."""
        relay = self._open.pop((label, count), None)
        if relay is None or not relay.rounds_left:
            if relay is not None:
                relay.close()
            relay = self._begun(label, count, ROUNDS)[0]
        self._open[label, count] = relay  # the last of the dict is the one that was used last
        while len(self._open) > OPEN:
            self._open.pop(next(iter(self._open))).close()
        return relay

    def _count_together(self, label: int) -> int:
        """Return how many samples of a call are evaluated together: several where each is answered as it is alone.

        Not every pipeline takes its number of samples at its word: some ignore it, repeat only a part of what they are given, or draw
        something else for each sample.
        """
        if label not in self._together:
            self._together[label] = TOGETHER if self._several and self._answers_alike(label) else 1
        return self._together[label]

    def _answers_alike(self, label: int) -> bool:
        try:
            relay, several = self._begun(label, TOGETHER, ROUNDS)
        except (ModelError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return False
        self._open[label, TOGETHER] = relay
        states = torch.cat([several.x[TOGETHER - 1 : TOGETHER]] * self._copies)
        alone = self._relay(label, 1).ask(states, float(several.time)).output[:1]
        alike = self._same(several.output[TOGETHER - 1 : TOGETHER], alone)
        if not alike:
            self._open.pop((label, TOGETHER), relay).close()
        return alike

    def _same(self, one: Tensor, other: Tensor) -> bool:
        """Return whether two answers differ by rounding at most, in the dtype of the coarsest network."""
        weights = (next(part.parameters(), None) for part in self.components.values())
        kinds = [weight.dtype for weight in weights if weight is not None and weight.is_floating_point()]
        allowed = max([SAME_TOGETHER, *(8 * torch.finfo(kind).eps for kind in kinds)])
        size, apart = (float(value.float().square().mean().sqrt()) for value in (one, one.float() - other.float()))
        return apart <= allowed * max(size, 1e-12)

    def _begun(self, label: int, count: int, rounds: int) -> tuple[Relay, Evaluation]:
        """Begin a call, and hold its law and its shape to those of the others."""
        from fewstep.integrations.diffusers.relay import Relay  # which needs diffusers

        relay = Relay(self._pipe, self._call(label, count, rounds))
        try:
            first = relay.begin()
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # what pipelines raise for arguments that they cannot use
            raise ModelError(f"a {type(self._pipe).__name__} refused call {label}: {type(error).__name__}: {first_line(error)}") from error
        law, shape = relay.law, tuple(first.x.shape[1:])
        assert law is not None  # a step comes after set_timesteps
        ours = (shape, _apart_from_shift(law), law.prediction.name, len(first.x) / count)
        if not hasattr(self, "law"):
            self.law, self.shape, self.dtype, self._ours = law, shape, first.x.dtype, ours
            self._copies = len(first.x) // count  # two where a pipeline keeps the states of both halves of its guidance
        if ours != self._ours:
            relay.close()
            raise ModelError(
                f"call {label} has {len(first.x) / count:g} states of {shape} on {law.schedule} for a sample, call 0 {self._copies} of "
                f"{self.shape} on {self.law.schedule}: a sampler is fitted to one noise law and one size"
            )
        return relay, first

    def _call(self, label: int, count: int, rounds: int) -> Callable[[], Any]:
        call = dict(self._calls[label])
        seed, known = call.pop("seed", 0), _parameters(self._pipe)
        if self._several:
            call[self._several] = count
        if "generator" in known:
            call["generator"] = torch.Generator().manual_seed(seed)

        pipe, encoded = self._pipe, self._encoded  # and not the loop itself, which could not end while a call of it waits

        def run() -> None:
            if hasattr(pipe, "encode_prompt"):
                pipe.encode_prompt = _remembering(type(pipe).encode_prompt.__get__(pipe), encoded)
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
            with torch.no_grad():
                pipe(**call, num_inference_steps=rounds)

        return run

    def _try_out(self) -> None:
        """Lead the first call once: its loop has to follow, begin at pure noise, and answer by the state and the time alone."""
        relay, first = self._begun(0, 1, PROBES)
        try:
            start = float(self.law.held_time(torch.tensor(self.law.schedule.t_max, dtype=torch.float64)))
            if abs(float(first.time) - start) > 1e-3 * start:
                raise ModelError(
                    f"the loop of call 0 begins at the time {float(first.time):g}, not at pure noise ({start:g}): it starts from a "
                    "picture, and a sampler is fitted to whole trajectories; leave strength out"
                )
            relay.ask(first.x, start / 2)  # a loop that copies its times is found here
            answers = [relay.ask(first.x, float(first.time)).output for _ in range(relay.rounds_left)]
        finally:
            relay.close()
        for answer in answers:
            self._hold_to(
                first,
                answer,
                "at another step of its loop, at the same state and time (guidance or control that begins or ends at a step, "
                "guidance with a memory, a cache, dropout)",
            )
        again = self._relay(0, 1).ask(first.x, float(first.time)).output
        self._hold_to(
            first, again, "in a call of another number of steps, at the same state and time (guidance that changes with the steps)"
        )

    def _hold_to(self, first: Evaluation, answer: Tensor, where: str) -> None:
        size = float(first.output.float().square().mean().sqrt())
        if float((answer - first.output).float().abs().max()) > SAME * max(size, 1e-12):
            raise ModelError(f"the network of a {type(self._pipe).__name__} answers otherwise {where}: leave that out of the call")


def _close(relays: dict[tuple[int, int], Relay]) -> None:
    """End the calls that wait for their next turn."""
    while relays:
        relays.popitem()[1].close()


def _remembering(encode: Callable[..., Any], kept: dict[str, Any]) -> Callable[..., Any]:
    """Return ``encode_prompt`` with its answers to texts and numbers kept, so that a call that begins anew does not wait for it."""

    @functools.wraps(encode)
    def remembering(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        if not _is_text(list(args)) or not _is_text(list(options.values())):
            return encode(*args, **options)
        key = repr((args, sorted(options.items())))
        if key not in kept:
            kept[key] = encode(*args, **options)
        return kept[key]

    return remembering


def _is_text(value: Any) -> bool:  # noqa: ANN401
    """Return whether a value is told from all others by its `repr`: texts, numbers and lists of them, and no tensors or pictures."""
    if isinstance(value, list | tuple):
        return all(map(_is_text, value))
    return isinstance(value, str | int | float | bool | torch.device | torch.dtype | None)


def _guider(pipe: Any) -> list[Any]:  # noqa: ANN401
    """Return the class and the numbers of a modular pipeline's guider; an empty list where there is none."""
    guider = pipe.components.get("guider")
    if guider is None:
        return []
    return [type(guider).__name__, {key: value for key, value in guider.config.items() if isinstance(value, str | bool | int | float)}]


def _parameters(pipe: Any) -> Mapping[str, Any]:  # noqa: ANN401
    """Return the arguments of a pipeline's call by name; those of a modular pipeline are the inputs of its blocks."""
    blocks: Any = getattr(pipe, "blocks", None)
    if hasattr(blocks, "input_names"):
        return dict.fromkeys(blocks.input_names)
    return inspect.signature(type(pipe).__call__).parameters


def _is_count(name: str) -> bool:
    """Return whether an argument is the number of samples of each prompt: ``num_images_per_prompt`` and alike."""
    return name.startswith("num_") and name.endswith("_per_prompt")


def _apart_from_shift(law: NoiseLaw) -> dict[str, Any]:
    """Return a law without a flow's shift, which pipelines choose by the size or the number of steps: it moves ``t``, not the ODE."""
    return {key: value for key, value in law.schedule.to_config().items() if key != "shift"}


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return a value of a call with its pictures as arrays, which a fingerprint can be taken of."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if type(value).__module__.startswith("PIL."):
        return np.array(value)
    return value
