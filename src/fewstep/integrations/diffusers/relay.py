"""The relay: a pipeline's own loop as the other side of a conversation, so that its call is the denoiser.

A pipeline's call knows everything about its network: what conditions it, how it is guided, which expert answers when. So nothing of it is
rebuilt here. A `RelayScheduler` stands in the pipeline, in a thread of its own. Its `step` hands over the network's guided answer and waits
for the next state and time that a learner wants, which the pipeline's loop then evaluates as its own. Only one side ever runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.integrations.diffusers.arguments import one_time, refuse_asked
from fewstep.integrations.diffusers.scheduler import FewstepScheduler, FewstepSchedulerOutput
from fewstep.models.formats.diffusers_law import NoiseLaw
from fewstep.runtime.errors import ModelError

__all__ = ["Evaluation", "Relay"]


class Evaluation(NamedTuple):
    """One pass of a pipeline's loop.

    Attributes:
        x: the state that the network was evaluated at, ``[B, *D]``, in the pipeline's dtype.
        time: the network's own time, ``[]``.
        output: the guided answer, ``[B, *D]``.
    """

    x: Tensor
    time: Tensor
    output: Tensor


class _Ended(BaseException):
    """The end of a conversation, raised inside the pipeline's loop: no ``except Exception`` of a pipeline stops it."""


class _RelayScheduler(FewstepScheduler):
    """A scheduler whose `step` takes no step: it hands over the network's answer and returns the state that is wanted next.

    Args:
        config: that of the pipeline's own scheduler.
        relay: the conversation.
    """

    _relay: Relay

    def _law_of(self, mu: float | None) -> NoiseLaw:
        return replace(super()._law_of(mu), grows=False)  # states are those that the network sees

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,  # noqa: ANN401
        timesteps: Any = None,  # noqa: ANN401 - pipelines look for these names
        sigmas: Any = None,  # noqa: ANN401
        mu: float | None = None,
        original_inference_steps: int | None = None,
        **unknown: Any,  # noqa: ANN401
    ) -> None:
        """Lay out the pipeline's first time, and its last for all others: each is replaced by the one that is wanted then."""
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu, original_inference_steps, **unknown)
        self.timesteps = self.timesteps.float()  # a copy; a learner may want times between those of a table
        self.timesteps[1:] = self._law.held_time(self._law.schedule.ends.min()).item()  # a loop that looks ahead is found by it
        self._relay.law, self._relay.round = self._law, 0

    def step(
        self,
        model_output: Tensor,
        timestep: Any,  # noqa: ANN401
        sample: Tensor,
        generator: Any = None,  # noqa: ANN401, ARG002 - nothing is drawn here
        variance_noise: Tensor | None = None,  # noqa: ARG002
        return_dict: bool = True,
        *,
        eta: float | None = 0.0,
        use_clipped_model_output: bool | None = None,
        **unknown: Any,  # noqa: ANN401
    ) -> FewstepSchedulerOutput | tuple[Tensor, Tensor]:
        """Hand over the answer ``model_output [B, *D]`` at the state ``sample [B, *D]``, and return the next state.

        Raises:
            FewstepError: an argument that would change the step of another scheduler, as in `FewstepScheduler.step`.
        """
        refuse_asked("step", unknown, eta=eta, use_clipped_model_output=use_clipped_model_output)
        if model_output.shape != sample.shape:
            model_output = self._mean(model_output, sample)
        x = self._relay.answered(sample, timestep, model_output)
        return FewstepSchedulerOutput(x, x) if return_dict else (x, x)


class Relay:
    """A conversation with one call of a pipeline.

    Args:
        pipe: the pipeline.
        call: makes its call, a function of no arguments; the pipeline's scheduler is the relay's meanwhile.

    Attributes:
        law: the noise law of the call, once the loop has begun: pipelines choose a shift by the size of the picture.
    """

    def __init__(self, pipe: Any, call: Callable[[], Any]) -> None:  # noqa: ANN401 - a diffusers pipeline
        self.pipe, self.round = pipe, 0
        self.law: NoiseLaw | None = None
        self._call, self._asked, self._told = call, SimpleQueue[tuple[Tensor, float] | None](), SimpleQueue[Any]()
        scheduler = _RelayScheduler.from_config(pipe.scheduler.config, solver="ddim", grid=None, timestep_spacing="trailing")
        scheduler._relay, scheduler.init_noise_sigma = self, 1.0  # noqa: SLF001 - its other half
        if scheduler.config["thresholding"]:
            raise ModelError("the scheduler of this pipeline clips its estimates (thresholding), unseen by a learner: switch it off")
        self._scheduler, self._theirs = scheduler, dict(vars(pipe))
        self._wanted: float | None = None
        self._thread = threading.Thread(target=self._run, name="fewstep-relay", daemon=True)
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.ended = False

    # -- the learner's side -----------------------------------------------------------------------------------------

    def begin(self) -> Evaluation:
        """Start the call, and return the evaluation at its own first state and time.

        Raises:
            Exception: what the call raised.
        """
        return self._listen(self._thread.start)

    @property
    def rounds_left(self) -> int:
        """The number of evaluations that the loop has left."""
        return 0 if self.ended else len(self._scheduler.timesteps) - 1 - self.round

    def ask(self, x: Tensor, time: float) -> Evaluation:
        """Return the evaluation at ``x [B, *D]`` and the network's own ``time``.

        Raises:
            ModelError: the loop is over, or the pipeline does not take its times from the scheduler as it goes.
            Exception: what the call raised.
        """
        if not self.rounds_left:
            raise ModelError("this call of the pipeline is over: begin another")
        return self._listen(lambda: self._asked.put((x, time)))

    def close(self) -> None:
        """End the call, wait for its thread, and leave the pipeline as it was."""
        if not self.ended:
            self.ended = True
            if self._thread.is_alive():
                with _Lent(self):
                    self._asked.put(None)
                    self._thread.join()

    def _listen(self, speak: Callable[[], None]) -> Evaluation:
        with _Lent(self):
            try:
                speak()
                answer = self._told.get()
            except BaseException:  # an interrupt while the network runs: the loop ends at its next step
                self.ended = True
                self._asked.put(None)
                self._thread.join()
                raise
        if isinstance(answer, Evaluation):
            return answer
        self.ended = True
        self._thread.join()
        if isinstance(answer, BaseException):
            raise answer
        raise ModelError(f"a {type(self.pipe).__name__} ended without evaluating its network: it is not a loop over scheduler.timesteps")

    # -- the pipeline's side ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self._call()
            self._told.put(None)
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the other side
            self._told.put(error)

    def answered(self, x: Tensor, timestep: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        """Hand over an answer, wait for what is wanted next, and return its state in the pipeline's dtype.

        Args:
            x: the state ``[B, *D]`` of the evaluation.
            timestep: the time that the loop has told the network.
            output: the guided answer, ``[B, *D]``.

        Raises:
            ModelError: the loop was at another time than was wanted.
        """
        time = one_time(torch.as_tensor(timestep)).detach().clone()
        if self._wanted is not None and abs(float(time) - self._wanted) > 1e-3 * max(1.0, abs(self._wanted)):
            raise ModelError(
                f"a {type(self.pipe).__name__} was asked at the time {self._wanted:g} and evaluated {float(time):g}: it copies its times "
                "before the loop, so its loop cannot be led"
            )
        self._told.put(Evaluation(x.detach().clone(), time, output.detach()))
        asked = self._asked.get()
        if asked is None:
            raise _Ended
        wanted, at = asked
        self.round += 1
        times = self._scheduler.timesteps
        if self.round < len(times):
            times[self.round] = at
            self._wanted = float(times[self.round])
        return wanted.to(x.device, x.dtype).clone()


class _Lent:
    """The time for which a relay has the pipeline: its scheduler and the attributes of its call stand in, and go out again.

    A pipeline keeps facts of a call in its attributes (its guidance scale, its number of steps), so several calls that take turns would
    read each other's.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay, self.pipe = relay, relay.pipe

    def __enter__(self) -> None:
        self.before = dict(vars(self.pipe))
        self._become(self.relay._theirs)  # noqa: SLF001
        self.pipe.scheduler = self.relay._scheduler  # noqa: SLF001

    def __exit__(self, *_: object) -> None:
        self.relay._theirs = dict(vars(self.pipe))  # noqa: SLF001
        self._become(self.before)

    def _become(self, attributes: dict[str, Any]) -> None:
        kept = vars(self.pipe)
        kept.clear()
        kept.update(attributes)
