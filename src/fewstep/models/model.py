"""The `Model`: a trained network with its noise law, prediction type and sample shape, and the artifacts that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.condition import check_batch
from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.domain import Cube, check_unbounded
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import Prediction, aligned, prediction, to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import make_grid
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Tableau
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.guidance import Wrapped, both_answers, classifier_free, default_scale
from fewstep.models.identity import Part, digest, parts, state_of
from fewstep.models.networks.between_times import BetweenTimes
from fewstep.models.networks.calls import (
    answer_of,
    computes,
    is_offloaded,
    network_device,
    network_dtype,
    plain_call,
    refusals,
    same_time,
    unwritten,
    whole_times,
)
from fewstep.models.networks.scaled_call import ScaledCall
from fewstep.models.reflected import check_levels, check_reflected_law, mirrored
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import rounded
from fewstep.runtime.errors import ArtifactError, GridError, ModelError, SolverError, counted
from fewstep.runtime.front_door import checked_class, is_count, number, whole
from fewstep.runtime.spec import as_typed
from fewstep.sampling.sampler import Sampler

__all__ = ["Model"]

WHOLE_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WEIGHTS = Path(__file__).parent / "weights"  # of the bundled models
_FACTS: dict[str, tuple[Any, str]] = {  # plain fields: their type, and what it means
    "name": (str, "a word"),
    "identity": (str, "a word for its weights and code"),
    "data": (str | None, "the name of a data set, or None"),
    "folder": (str | Path | None, "the folder it was loaded from, or None"),
    "given": (Carried | None, "a Carried, or None"),
    "card": (Mapping, "a dict of facts"),
}


@checked_class
@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained network as a model to sample. It is a `Denoiser`: ``model(x, t, cond)`` estimates the clean image.

    Attributes:
        network: the module or function. It is called as ``call(network, x, time, cond)`` in its own dtype.
        schedule: the noise law it was trained with.
        prediction: its prediction type: ``epsilon``, ``sample`` (x0), ``v``, ``score``, ``flow``, ``edm(sigma_data)``.
        shape: the shape of one sample without the batch, ``(C, H, W)``; needed to draw noise.
        time: function from the schedule's ``t`` to the network's own time; by default ``t`` itself. ``[*] -> [*]``.
        call: function that calls the network; by default ``network(x, time)``, and ``network(x, time, cond)`` when there is a condition.
        classes: number of class labels, or None without.
        null_label: the label that stands for no condition, or None if it has none.
        dtype: the floating dtype that the network computes in; by default its own, or that of most of its weights.
        time_dtype: the dtype of the time that it is given, as ``torch.int64`` for an embedding of whole times; by default at least float32.
        identity: a word that stands for its weights and code in the fingerprint, where these cannot be read (weights that are offloaded or
            sharded, functions that hold what has no values); by default they are hashed.
        scales: the least and the largest guidance scale, where the network is told its scale and answers by one call, as a student of
            guided distillation does.
        flow_map: for a student, the map along the trajectory that takes the place of denoising.
        domain: for a reflected model, the cube in which its network was trained with noise that is folded back at the walls. States beyond
            a wall are mirrored for the network and the answer is mirrored back, and samples are folded into the cube. It is a property of
            the training, and does nothing good to an ordinary network.
        name: the model's name in tables and errors; by default the class of the network.
        data: the data set it was trained on, by the name `load_images` knows, or None.
        folder: the folder it was loaded from, with the artifacts below it.
        given: artifacts in memory, in place of those in the folder.
        build: how the network is built again, so that the model and its students can be saved: its class or a function of a module of
            yours, or ``functools.partial`` of one with plain keyword arguments; by default the class of the network without arguments.
        card: provenance and figures of the learner that made it.

    Raises:
        FewstepError: an unknown prediction type, a value that is no shape, schedule, function, dtype, number of classes or flow map, or a
            flow map that calls another network.

    Examples:
        >>> import torch, fewstep
        >>> net = torch.nn.Module(); net.forward = lambda x, t: 0 * x
        >>> model = fewstep.Model(net, fewstep.DiscreteVP.linear(), "epsilon", shape=(3,))
        >>> model(torch.ones(2, 3), torch.tensor(0.0)).shape
        torch.Size([2, 3])
    """

    network: Callable[..., Any]
    schedule: NoiseSchedule
    prediction: str | Prediction
    _: KW_ONLY
    shape: tuple[int, ...] | None = None
    time: Callable[[Tensor], Tensor] = same_time
    call: Callable[..., Any] | None = None
    classes: int | None = None
    null_label: int | None = None
    dtype: torch.dtype | None = None
    time_dtype: torch.dtype | None = None
    identity: str = ""
    scales: tuple[float, float] | None = None
    flow_map: FlowMap | None = None
    domain: Cube | None = None
    name: str = ""
    data: str | None = None
    folder: Path | None = None
    given: Carried | None = None
    build: Callable[..., nn.Module] | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise ModelError(f"a model's network is a module or a function, got {type(self.network).__name__}")
        if not isinstance(self.schedule, NoiseSchedule):
            raise ModelError(
                f"a schedule is a noise law, as fewstep.DiscreteVP.scaled_linear() or fewstep.RectifiedFlow(), got {self.schedule!r}"
            )
        if self.shape is not None:
            if isinstance(self.shape, str) or not isinstance(self.shape, Sequence) or not self.shape or not all(map(is_count, self.shape)):
                raise ModelError(f"shape is that of one sample without the batch, as (4, 64, 64), got {self.shape!r}")
            object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        if self.classes is not None:
            if not is_count(self.classes):
                raise ModelError(f"classes is the number of class labels, or None, got {self.classes!r}")
            object.__setattr__(self, "classes", int(self.classes))
        if self.null_label is not None:
            object.__setattr__(self, "null_label", whole(self.null_label, "null_label", ModelError))
        if self.dtype is not None and not computes(self.dtype):
            raise ModelError(f"dtype is the floating dtype that the network computes in, as torch.bfloat16, got {self.dtype!r}")
        if self.time_dtype is not None and not (computes(self.time_dtype) or self.time_dtype in WHOLE_DTYPES):
            raise ModelError(f"time_dtype is the dtype of the network's time, as torch.int64, got {self.time_dtype!r}")
        for name, (kind, meaning) in _FACTS.items():
            if not isinstance(getattr(self, name), kind):
                raise ModelError(f"{name} of a Model is {meaning}, got {str(getattr(self, name))[:80]!r}")
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder))
        if not callable(self.time) or not (self.call is None or callable(self.call)):
            raise ModelError(f"time and call are functions, t -> time and (network, x, time, cond) -> output, got {self.time}, {self.call}")
        if not (self.build is None or callable(self.build)) or isinstance(self.build, nn.Module):
            raise ModelError(f"build is what builds the network again, as functools.partial(Net, width=64), got {str(self.build)[:80]!r}")
        if self.scales is not None and not (isinstance(self.call, ScaledCall) or self.flow_map is not None):
            raise ModelError(
                f"scales are those of a network that is told its guidance scale, which the call of {self.name} does not tell it"
            )
        if not isinstance(self.flow_map, FlowMap | None):
            raise ModelError(f"flow_map is a fewstep.FlowMap, got {type(self.flow_map).__name__}: subclass it")
        if self.flow_map is not None and self.flow_map.called is not None and self.flow_map.called is not self.network:
            raise ModelError(
                f"{self.name or type(self.network).__name__} has a flow map that calls another network, so this one would answer nothing: "
                "pass the flow map of the new network with it, as flow_map=; or make the model anew, as by fewstep.flow_map_model"
            )
        if not isinstance(self.domain, Cube | None):
            raise ModelError(f"domain is the cube that a reflected model was trained in, as fewstep.Cube(-1, 1), got {self.domain!r}")
        if self.domain is not None:
            check_reflected_law(self.schedule, self.name or type(self.network).__name__, self.domain)
            if self.flow_map is not None:
                raise ModelError("a student jumps past the walls and is not mirrored there: leave domain or flow_map out")
        object.__setattr__(self, "prediction", prediction(self.prediction))
        object.__setattr__(self, "name", self.name or type(self.network).__name__)

    def __repr__(self) -> str:
        kind = "flow map" if self.flow_map is not None else prediction(self.prediction).name
        kind = kind if self.domain is None else f"reflected in [{self.domain.low:g}, {self.domain.high:g}]"
        facts = [self.name, kind, f"samples of {self.shape}" if self.shape is not None else "no shape"]
        return f"Model({', '.join([*facts, *([] if self.classes is None else [f'{self.classes} classes'])])})"

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Estimate the clean image ``x0 [B, *D]`` from the state ``x [B, *D]`` at time ``t`` (``[]`` or ``[B]``).

        Of a reflected model it is the mean mirror image of the data, which is near ``x`` at large noise levels; ``x`` may be anywhere.

        Raises:
            ModelError: the network refused its inputs (what it said), the prediction is undefined at ``t``, the model is a student, or a
                reflected one that does not know this time.
        """
        if self.flow_map is not None:
            raise ModelError(f"{self.name} is a student, which has to know where a step leads: sample it by fewstep.sample")
        check_batch(cond, len(x))
        if self.domain is None:
            return self._estimate(x, t, cond)
        check_levels(self.schedule, t, self.name)
        return mirrored(lambda inside: self._estimate(inside, t, cond), x, self.domain)

    def _estimate(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return what the network answers to ``x [B, *D]``, as a clean image."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        kind = prediction(self.prediction)  # resolved at birth
        dtype = self.dtype or network_dtype(self.network, x.dtype)
        scaled = x if kind.input_scale is None else x * aligned(kind.input_scale(alpha, sigma), x)
        time = self.network_time(t, x, dtype)
        with refusals(x), unwritten(x):
            output = (self.call or plain_call)(self.network, scaled.to(dtype), time, cond)
        return to_x0(kind, answer_of(output, x), x, alpha, sigma)

    def network_time(self, t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the network's own time of each sample of ``x [B, *D]``, ``[B]``.

        Raises:
            ModelError: `time` answers none, or a fraction where the network takes whole times.
        """
        time = self.time(self.schedule.held(t))
        if not isinstance(time, Tensor) or time.is_complex() or time.shape not in (t.shape, (len(x),)):
            what = f"{time.dtype} of shape {tuple(time.shape)}" if isinstance(time, Tensor) else f"a {type(time).__name__}"
            raise ModelError(f"time of {self.name} answers {what} to times of shape {tuple(t.shape)}: it is a function t [*] -> [*]")
        if self.time_dtype is not None:
            time = whole_times(time, self.time_dtype, self.name)
        kind = self.time_dtype or torch.promote_types(dtype, torch.float32)
        return time.to(kind).to(x.device).expand(len(x))

    def save(self, folder: str | Path) -> Path:
        """Write the model as a folder that `load_model` reads, whole or not at all, and return the folder.

        It holds the weights as safetensors and a description. A network of a class of one's own is built again by its name and `build`, so
        `load_model` imports that code, and does so only with ``trust=True``; ``time`` and ``call`` are functions with a name too. The model
        is built again once while it is saved, and compared.

        Args:
            folder: new or empty.

        Raises:
            ModelError: something that has no name to import it by (a lambda, a class inside a function or of the running script), a network
                that is built again otherwise, or somebody else's flow map; each says how to mend it.
            ArtifactError: the folder holds a model already, is in use, or cannot be written.
        """
        from fewstep.models.formats.folders import save_model  # which makes models

        return save_model(self, folder)

    # -- how it is sampled ------------------------------------------------------------------------------------------

    @property
    def hosted(self) -> bool:
        """Whether its samplers run in a program that calls the network at every step, as a pipeline does."""
        return False

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        return network_device(self.network)

    @property
    def default_guidance(self) -> float:
        """The guidance scale of calls that name none: 1, or what is nearest to it among those that it is told."""
        return default_scale(self.scales)

    @property
    def conditional(self) -> Denoiser:
        """The denoiser without guidance."""
        return self

    def guided(self, scale: float | Tensor = 1.0) -> Denoiser | FlowMap:
        """Return the denoiser with classifier-free guidance; scale 1 is the model as it is, and a student is its flow map.

        A network that is told its scale answers by one call.

        Args:
            scale: guidance scale, or one for each sample of a batch ``[B]``.

        Raises:
            ModelError: the model has no null label to guide away from, is a student of one scale and this is not 1, or was not taught this
                scale.
        """
        if self.scales is not None:
            return self._at_scale(scale, *self.scales)
        alone = isinstance(scale, float | int) and scale == 1
        if alone:
            return self.conditional if self.flow_map is None else self.flow_map
        uncond = self._null()
        guided = classifier_free(self.conditional, scale, uncond)

        def by_label(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            self._check_guided_by(cond)
            return guided(x, t, cond)

        return Wrapped(self.schedule, by_label, calls=2, domain=self.domain)

    def both_answers(self) -> Callable[[Tensor, Tensor, Cond], tuple[Tensor, Tensor]]:
        """Return the function whose answers ``[B, *D]`` are those without the condition and with it, from one call on a doubled batch.

        Raises:
            ModelError: the model has no null label, is a student, or is told its guidance scale and has no answer without the condition.
        """
        if self.scales is not None:
            raise ModelError(f"{self.name} is told its guidance scale, and has no answer without the condition: take its teacher")
        conditional, uncond = self.conditional, self._null("use guidance 1 of the usual form")

        def both(x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
            self._check_guided_by(cond)
            return both_answers(conditional, x, t, cond, uncond)

        return both

    def _null(self, otherwise: str = "use guidance 1") -> Tensor:
        """Return the null label ``[]`` that guidance leads away from.

        Args:
            otherwise: what to do without one, for the message.

        Raises:
            ModelError: there is none, or the model is a student.
        """
        if self.flow_map is not None or self.tuned is not None:
            raise ModelError(f"{self.name} is a student: its guidance is in its weights; {otherwise}")
        if self.null_label is None:
            raise ModelError(f"{self.name} cannot be guided: it is not class-conditional with a null label; {otherwise}")
        return torch.tensor(self.null_label)

    def _check_guided_by(self, cond: Cond) -> None:
        """Refuse a condition that is none of labels.

        Raises:
            ModelError: it is a tensor of something else.
        """
        if isinstance(cond, Tensor) and (cond.is_floating_point() or cond.ndim != 1):
            raise ModelError(
                f"{self.name} is guided away from the label {self.null_label}, so its condition is labels [B], whole numbers, not "
                f"{cond.dtype} of shape {tuple(cond.shape)}: for others use fewstep.classifier_free(model, scale, uncond)"
            )

    def _at_scale(self, scale: float | Tensor, low: float, high: float) -> Denoiser | FlowMap:
        """Return a model that is told its scale, at one between ``low`` and ``high``."""
        if not isinstance(scale, Tensor):
            scale = number(scale, "a guidance scale", ModelError)
        elif scale.ndim > 1 or not scale.numel() or scale.is_complex() or scale.dtype == torch.bool:
            what = f"{str(scale.dtype).removeprefix('torch.')} of shape {tuple(scale.shape)}"
            raise ModelError(f"guidance is a scale, or one for each sample [B], not a tensor of {what}")
        least, most = (float(torch.as_tensor(bound(scale) if isinstance(scale, Tensor) else scale)) for bound in (torch.min, torch.max))
        if not low <= least <= most <= high:
            raise ModelError(
                f"{self.name} knows guidance scales from {low:g} to {high:g}, not {most if low <= least else least:g}: use one of those, "
                "or distil a wider range"
            )
        if self.flow_map is not None:
            return self.flow_map.at(scale)
        assert isinstance(self.call, ScaledCall)  # checked at birth
        same = not isinstance(scale, Tensor) and not isinstance(self.call.scale, Tensor) and scale == self.call.scale
        return self if same else replace(self, call=replace(self.call, scale=scale))

    def at_any_time(self) -> Model:
        """Return the model for learners, which ask between the times of its network's table.

        Where the network takes whole times, its output between two of them is interpolated linearly, at the price of two evaluations, so
        that its trajectories are those of one smooth model; at its own times it answers as it is. Any other model is returned as it is.

        Raises:
            ModelError: it takes whole times, and its noise law has no table of times that are whole to it.
        """
        if self.time_dtype is None or self.time_dtype.is_floating_point:
            return self
        table, mend = self.schedule.times, "use the law of its table, as fewstep.DiscreteVP.from_betas(betas)"
        if table is None:
            raise ModelError(f"{self.name} takes whole times, and a {type(self.schedule).__name__} has others between them: {mend}")
        try:
            told = whole_times(self.time(table[table >= self.schedule.t_last]), self.time_dtype, self.name)
        except ModelError as error:
            raise ModelError(f"{error}; all times of its table have to be whole: {mend}, or another time=") from error
        between = BetweenTimes(self.call or plain_call, self.time_dtype, float(told.min()), float(told.max()))
        return replace(self, call=between, time_dtype=torch.float64, scales=None)

    def condition(self, cond: Cond, count: int) -> Cond:
        """Return what the network of a model with classes is conditioned on: labels of any library as a tensor ``[B]``.

        What is no list or array of whole numbers is returned as it is.

        Raises:
            ModelError: labels that the model does not have.
        """
        if self.classes is None or cond is None:
            return cond
        try:
            labels = torch.as_tensor(cond) if not isinstance(cond, dict | str) else None
        except (TypeError, ValueError, RuntimeError):
            return cond
        if labels is None or labels.is_floating_point() or labels.is_complex():
            return cond
        flags, labels = labels.dtype == torch.bool, labels.long()  # other whole numbers are no indices, or cannot be compared
        known = (labels >= 0) & (labels < self.classes)
        if self.null_label is not None:
            known |= labels == self.null_label
        if flags or labels.shape != (count,) or not bool(known.all()):
            what = f"{labels.tolist()}"[:80] if labels.numel() < 20 else f"a tensor of shape {tuple(labels.shape)}"
            raise ModelError(f"{self.name} has labels 0 to {self.classes - 1}, one for each of {count} samples, got {what}")
        return labels

    def labels(self, seeds: Sequence[int], label: int | None = None) -> Tensor | None:
        """Return one class label per sample, ``[len(seeds)]``: ``label``, or the seed modulo the number of classes; None without classes.

        Raises:
            ModelError: a label the model does not have.
        """
        if self.classes is None:
            if label is not None:
                raise ModelError(f"{self.name} takes no labels")
            return None
        label = None if label is None else whole(label, "a label", ModelError)
        if label is not None and not 0 <= label < self.classes:
            raise ModelError(f"{self.name} has labels 0 to {self.classes - 1}, got {label}")
        return torch.tensor([seed % self.classes if label is None else label for seed in seeds], dtype=torch.int64)

    def with_network(self, network: nn.Module, **changes: Any) -> Model:  # noqa: ANN401
        """Return the same model with another network, as a student's, and other changes; its `identity` says so.

        Raises:
            ModelError: it is a flow map that calls the old network, and no other is among the changes.
        """
        identity = self.identity and f"{self.identity} {digest(parts(network))}"
        return replace(self, network=network, identity=identity, **changes)

    def need_shape(self) -> tuple[int, ...]:
        """Return the shape of a sample.

        Raises:
            ModelError: the model was made without one.
        """
        if self.shape is None:
            raise ModelError(f"{self.name} does not know the shape of its samples: make the Model with shape=, as in shape=(4, 64, 64)")
        return self.shape

    def need_denoiser(self) -> Model:
        """Return the model itself.

        Raises:
            ModelError: it is a student, which nothing can be learned from.
        """
        if self.flow_map is not None:
            raise ModelError(f"{self.name} is a student, which is sampled as it is: name its teacher")
        return self

    def need_trajectories(self) -> Model:
        """Return the model itself, for what is learned or inferred from its answers at any time.

        Raises:
            ModelError: it is a student, or was made for few steps alone (whom to name).
        """
        model, tuned = self.need_denoiser(), self.tuned
        if tuned is not None and tuned.solver is not None:
            steps = "few steps" if tuned.nfe is None else counted(tuned.nfe, "step")
            raise ModelError(
                f"{self.name} was made for {steps} of {tuned.solver} alone, and its answers at other times mean nothing: sample it as it "
                f"is, or name its teacher, {tuned.teacher}"
            )
        return model

    def check_own_steps(self, tableau: Tableau) -> None:
        """Refuse another tableau than its own for a student whose answers are for its own steps alone.

        Raises:
            SolverError: it is another (and which steps there are).
            GridError: its own grid is missing.
            ArtifactError: its own grid is damaged.
        """
        tuned = self.tuned
        if tuned is None or not tuned.own_steps or tuned.solver is None or tuned.nfe is None:
            return
        tables = [one for one in self.carried.grids if one.solver == tuned.solver and tuned.nfe in one.grids]  # at another scale, too
        grid = tables[0].grids[tuned.nfe] if tables else self.optimized(tuned.solver, tuned.nfe)
        own = Sampler.build(tuned.solver, grid, self.schedule).tableau
        same = tableau.nodes.t.shape == own.nodes.t.shape and torch.allclose(tableau.nodes.t, own.nodes.t, rtol=1e-9)
        same = same and torch.allclose(tableau.unrolled().answers, own.unrolled().answers, rtol=1e-9)
        if not same or not torch.allclose(tableau.noise, own.noise, rtol=1e-9):
            times = ", ".join(f"{t:.6g}" for t in own.nodes.t.tolist())
            raise SolverError(
                f"{self.name} was taught its own {counted(tuned.nfe, 'step')} of {tuned.solver} alone, at the times {times}: leave solver, "
                f"nfe, grid, times and strength out, or sample its teacher, {tuned.teacher}"
            )

    def need_unbounded(self, taker: str, why: str) -> Model:
        """Return the model itself, for what cannot be right with a reflected one; see `check_unbounded`.

        Raises:
            ModelError: it is one.
        """
        check_unbounded(self, taker, why)
        return self

    def to(self, device: torch.device | str) -> Model:
        """Move the network and return the model."""
        if isinstance(self.network, nn.Module) and not is_offloaded(self.network):
            self.network.to(device)
        return self

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """The hash of what its answers depend on, the same on any machine: weights, code, noise law, prediction type, time and dtypes.

        Raises:
            ModelError: its network or call cannot be told from others.
        """
        found = list(self._parts())
        state = state_of(found)
        if self._hashed.get("state") != state:
            self._hashed.update(state=state, parts=found, digest=digest(found))  # the parts are kept, so that no others have their place
        return self._hashed["digest"]

    @cached_property
    def _hashed(self) -> dict[str, Any]:
        return {}

    def _parts(self) -> Iterator[Part]:
        schedule, kind = self.schedule, prediction(self.prediction)
        probes = torch.linspace(schedule.t_min + 1e-3, schedule.t_max, 5, dtype=torch.float64)
        yield "law", repr(rounded((schedule.to_config(), kind.name, self.time(probes).tolist())))
        if self.dtype not in (None, network_dtype(self.network, torch.float32)) or self.time_dtype is not None:
            yield "dtypes", repr((self.dtype, self.time_dtype))
        known: dict[int, tuple[str, Any]] = {}
        if not kind.is_named:
            yield from parts(kind, "prediction", known)
        if self.domain is not None:
            yield "domain", repr(rounded(self.domain.to_config()))
        if self.flow_map is not None:
            yield from parts(self.flow_map.definition or self.flow_map, "flow_map", known)
        if self.identity:
            yield "identity", self.identity
            return
        yield from parts(self.network, "network", known)
        if self.call is not None:
            yield from parts(self.call, "call", known)

    @cached_property
    def carried(self) -> Carried:
        """The artifacts that belong to the model, of its folder or in memory."""
        return Carried(self.folder) if self.given is None else self.given

    @property
    def tuned(self) -> Tuned | None:
        """The record of what the model was tuned for; None if it was not.

        Raises:
            ArtifactError: its ``tuned.json`` is damaged.
        """
        return self.carried.tuned

    @property
    def num_jumps(self) -> tuple[int, ...]:
        """The numbers of jumps from noise to image that a student can make; empty for any other model."""
        if self.flow_map is None:
            return ()
        return tuple(sorted({nfe for table in self.carried.grids if table.solver == "ddim" for nfe in table.grids}))

    def statistics(self, guidance: float = 1.0) -> ModelStatistics | None:
        """Return the statistics that the model carries for this guidance scale; None if there are none.

        Raises:
            ArtifactError: they are damaged.
        """
        return next((statistics for statistics in self.carried.statistics if statistics.guidance == guidance), None)

    def optimized(self, solver: str, nfe: int, guidance: float = 1.0) -> TimeGrid:
        """Return the optimised time grid of a solver that the model carries.

        Raises:
            GridError: there is none for this solver, number of evaluations and guidance scale (and what there is).
            ArtifactError: it is damaged, or was made for other weights.
        """
        tables = self.carried.grids
        table = next((table for table in tables if table.solver == solver and table.guidance in (guidance, None)), None)
        if table is None and self.flow_map is not None:
            if solver != "ddim":
                raise GridError(f"{self.name} is a student, which jumps by ddim alone: leave --solver out")
            if any(one.solver == solver for one in tables):
                raise GridError(f"{self.name} is a student without times of its own at guidance {guidance:g}: leave guidance out")
            anywhere = "say --grid angle, or another spacing" if self.flow_map.anywhere else "name times that it knows, by --times"
            raise GridError(f"{self.name} is a student whose folder has no times of its own (optimized/ddim is missing): {anywhere}")
        if table is None and self.tuned is not None and self.tuned.own_steps:
            steps = counted(self.tuned.nfe or 1, "step")
            raise GridError(
                f"{self.name} was taught its own {steps} of {self.tuned.solver} alone, not {solver}: leave --solver and --grid out, or "
                f"sample its teacher, {self.tuned.teacher}"
            )
        if table is None:
            known = ", ".join(f"{table.solver} {'' if table.guidance is None else 'at '}{table.scale}" for table in tables)
            there = f"there are some for {known}" if tables else "there are none in its folder"
            raise GridError(
                f"no optimized grid of {self.name} for {solver} at guidance {guidance:g}, {there}: make a sampler with "
                f"'fewstep optimize {self.command_name(guidance)} --solver {solver} --out DIR'"
            )
        if table.model != self.fingerprint:
            raise ArtifactError(f"the optimized grids {self._other_weights(table.model)}, or name another grid")
        fixed = self.flow_map is not None or (self.tuned is not None and self.tuned.own_steps)
        if fixed and nfe not in table.grids:
            first, *more = sorted(table.grids)
            passes = counted(first, "pass") if not more else f"{', '.join(map(str, (first, *more)))} passes"
            raise GridError(f"{self.name} makes {passes}, not {nfe}")
        return table.grid(nfe)

    def trajectory_grid(self, name: str, slots: int, guidance: float = 1.0) -> TimeGrid:
        """Return the times at which trajectories are stored: a spacing by name, or ``optimized``, the model's own for DDIM.

        Raises:
            GridError: an unknown spacing, or no optimised grid of so many steps.
        """
        return self.optimized("ddim", slots, guidance) if name == OPTIMIZED else make_grid(name, self.schedule, slots)

    def fitted(self, nfe: int, guidance: float = 1.0) -> Sampler:
        """Return the sampler fitted to the model that it carries.

        Raises:
            SolverError: there is none with so many evaluations at this guidance scale (and what there is).
            ArtifactError: it is damaged, or was made for other weights.
        """
        if self.flow_map is not None:
            raise SolverError(f"{self.name} is a student, which has passes and no fitted samplers: leave --solver out")
        samplers = self.carried.samplers
        for sampler in samplers:
            if (sampler.nfe, sampler.card.get("guidance")) == (nfe, guidance):
                if sampler.card.get("model") != self.fingerprint:
                    raise ArtifactError(f"the fitted samplers {self._other_weights(sampler.card.get('model'))}, or fit it again")
                return sampler
        known = ", ".join(f"{sampler.nfe} at {sampler.card.get('guidance'):g}" for sampler in samplers)
        there = f"there are some of {known}" if known else "there are none in its folder"
        raise SolverError(
            f"no fitted sampler of {self.name} with {counted(nfe, 'evaluation')} at guidance {guidance:g}, {there}: make one with "
            f"'fewstep fit {self.command_name(guidance)} --nfe {nfe} --out DIR' and use it with --sampler DIR"
        )

    def _other_weights(self, made_for: object) -> str:
        """Return what is wrong where what the model carries was made for other weights, and how to mend it."""
        where = "it carries" if self.folder is None else f"in {self.folder}"
        return (
            f"{where} were made for other weights or another dtype of {self.name} ({made_for}, not {self.fingerprint}): put these back, as "
            "by loading or making it anew"
        )

    def command_name(self, guidance: float) -> str:
        """Return how a command names this model and a guidance scale."""
        return f"{self.address}{' --trust' if self.needs_trust else ''}" + ("" if guidance == 1 else f" --guidance {as_typed(guidance)}")

    @property
    def needs_trust(self) -> bool:
        """Whether its folder names code to import, so that `load_model` wants ``trust=True``."""
        return self.folder is not None and self.build is not None

    @property
    def address(self) -> str:
        """How `load_model` finds it: its bundled name, or its folder; its name if it has none."""
        bundled = self.folder is None or (self.data is not None and self.folder.parent == WEIGHTS)
        return self.name if bundled else str(self.folder)
