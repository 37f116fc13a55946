r"""A flow map as a student: one network that leads from a state at any time to where its trajectory is at any later time.

The sampling ODE is ``d xb / d lam = D - xb`` in ``xb = x/alpha`` and ``lam = log(alpha/sigma)``. Solved from ``s`` to ``t`` it is a
first-order step with an averaged picture in the place of ``D``,

    X_{s,t}(x) = r x + (alpha_t - r alpha_s) g(x, s, t),    r = sigma_t / sigma_s,

where ``g`` is the mean of ``D`` along the trajectory with weight ``e^lam`` (after Boffi, Albergo and Vanden-Eijnden, arXiv 2406.07505).
The network answers ``g``, which is a picture on one scale for all pairs of times; it is told ``t`` by an extra embedding that is 0 at
first, so a new student is its teacher's first-order step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import aligned, prediction
from fewstep.core.tableau import Nodes
from fewstep.models.guidance import default_scale
from fewstep.models.model import Model
from fewstep.models.networks.beside import load_beside
from fewstep.models.networks.calls import plain_call
from fewstep.models.networks.extra_embedding import ConditionedNetwork, even, level_features, scale_features
from fewstep.models.networks.scaled_call import SCALE, ScaledCall, each_scale
from fewstep.runtime.artifact import ArtifactRecord, Number, listed, load_artifact, named_path, save_artifact
from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import at_least, check_fields, checked_class

__all__ = ["FlowMapForm", "FlowMapStudent"]

APART = ("network.network.", f"network.embeddings.{SCALE}.")  # weights that lie in files of their own
TIME = "time"  # the name of the embedding of the target time


@checked_class
@dataclass(frozen=True)
class FlowMapForm:
    """The parts of a flow map student, as options.

    Args:
        features: number of features of the target time.
        output: prediction type by which the network's output is read; by default the teacher's own, and ``v`` where that says nothing of
            the image at pure noise, as ``epsilon``.
        insert_at: submodule of the network whose output is its time embedding; known of the usual ones.

    Raises:
        FewstepError: a number out of range.
        ModelError: an unknown prediction type.
    """

    features: int = 16
    output: str | None = None
    insert_at: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, features=2)
        even(self.features)
        if self.output is not None:
            prediction(self.output)


@dataclass(frozen=True)
class FlowMapRecord(ArtifactRecord):
    """The fields of ``flow-map.json``, see `FlowMapStudent`."""

    FORMAT = "fewstep-flow-map"

    form: dict[str, Any]
    first: Number
    last: Number
    card: dict[str, Any]
    scales: tuple[Number, Number] | None = None
    single: bool = False


@dataclass(frozen=True)
class _Tell:
    """A call of a `ConditionedNetwork` that tells it features of more than its time.

    Attributes:
        features: by name, ``[B, F]`` each.
    """

    features: dict[str, Tensor]

    def __call__(self, network: ConditionedNetwork, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return network(x, time, cond, {name: value.to(x.dtype).to(x.device) for name, value in self.features.items()})


class FlowMapStudent(nn.Module):
    """A network that leads along the sampling trajectory: ``(x [B, *D], s, t, cond) -> g [B, *D]``, see above.

    Args:
        teacher: the model to begin with; its network gets a hook, so pass a copy. Where it is told a guidance scale, so is the student.
        first, last: the times between which it is trained.
        form: its parts.
        card: provenance, plain JSON values.

    Attributes:
        single: whether it leads from the first time to the last alone, as one that was trained on by distribution matching.

    Raises:
        ModelError: a network that does not say where its time is embedded, that is no module, or that takes whole times alone.
    """

    network: ConditionedNetwork

    def __init__(self, teacher: Model, first: float, last: float, form: FlowMapForm, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        if not isinstance(teacher.network, nn.Module):
            raise ModelError(f"{teacher.name} is a function, which cannot be trained: make the Model of a torch.nn.Module")
        network: Any = teacher.network
        told, self.scales = isinstance(teacher.call, ScaledCall), teacher.scales
        if told:  # its scale, which the student tells it itself
            teacher = replace(teacher, call=network.call, scales=None)
        teacher = teacher.at_any_time()
        kind = prediction(teacher.prediction)
        self.schedule, self.time = teacher.schedule, teacher.time
        self.prediction = prediction(form.output or ("v" if kind.undefined_at_zero_alpha else kind))
        self.dtype, self.time_dtype, self.form, self.card = teacher.dtype, teacher.time_dtype, form, dict(card or {})
        self.first, self.last, self.single = first, last, False
        if told:
            network.call = teacher.call
            if form.insert_at not in (None, network.insert_at):
                raise ModelError(
                    f"{teacher.name} is told its scale at {network.insert_at or 'the usual place'}, where its student is told its time, "
                    f"not at {form.insert_at}: leave insert_at out"
                )
        made: ConditionedNetwork = network if told else ConditionedNetwork(network, teacher.call or plain_call, form.insert_at)
        self.network = made.tell(TIME, form.features)

    def told(self, lam: Tensor, scale: Tensor | float | None = None) -> Model:
        """Return the denoiser that the network is when it is told the level ``lam [B]`` of the target time, and a guidance scale."""
        features = {TIME: level_features(lam, self.form.features)}
        if self.scales is not None:
            wanted = each_scale(default_scale(self.scales) if scale is None else scale, len(lam)).double()
            features[SCALE] = scale_features(wanted, self.scales[1], self.network.features[SCALE])
        options = {"time": self.time, "dtype": self.dtype, "time_dtype": self.time_dtype, "name": "the student"}
        return Model(self.network, self.schedule, self.prediction, call=_Tell(features), **options)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None, scale: Tensor | float | None = None) -> Tensor:
        """Return ``g [B, *D]``, the mean of the denoised picture along the way.

        Args:
            x: states ``[B, *D]`` at the times ``s``.
            s, t: times, the second later, ``[]`` or ``[B]`` float64 on the CPU.
            cond: the condition, as the network takes it.
            scale: the guidance scale, or one for each sample ``[B]``, where the network is told one.
        """
        return self.told(self.schedule.lam(t.expand(len(x))), scale)(x, s, cond)

    def jump(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None, scale: Tensor | float | None = None) -> Tensor:
        """Return the states ``[B, *D]`` at the times ``t`` on the trajectories through ``x`` at ``s``; arguments as of `forward`."""
        ratio, gain = Nodes.at(self.schedule, torch.stack([s, t])).first_order(0, 1)
        return aligned(ratio, x) * x + aligned(gain, x) * self(x, s, t, cond, scale)

    # -- as a folder ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, trust: bool = False) -> Path:
        """Write ``flow-map.json``, ``flow-map.safetensors`` and a card; the network itself is saved beside them by `save_like`.

        The embedding of its guidance scale, where it is told one, is saved by `save_guided`, before.

        Args:
            folder: of the model.
            trust: whether it names code to import, for the commands of the card.

        Raises:
            ArtifactError: the folder cannot be written, or the card is not JSON-able.
        """
        folder = named_path(folder)
        tensors = {name: value for name, value in self.state_dict().items() if not name.startswith(APART)}
        meta = {"form": asdict(self.form), "first": self.first, "last": self.last, "card": self.card}
        meta |= {} if self.scales is None else {"scales": list(self.scales)}
        meta |= {"single": True} if self.single else {}
        return save_artifact(folder, "flow-map", meta, tensors, self._readme(folder.name, trust))

    @classmethod
    def load(cls, folder: str | Path, teacher: Model) -> FlowMapStudent:
        """Load a student that `save` wrote, around the network of the same folder.

        Args:
            folder: with ``flow-map.json``.
            teacher: the model that was read from this folder.

        Raises:
            ArtifactError: a file is missing, damaged or of another version.
        """

        def build(meta: FlowMapRecord, tensors: dict[str, Tensor]) -> FlowMapStudent:
            if meta.scales != teacher.scales:
                raise ValueError(f"it knows guidance scales {meta.scales}, and guided.json beside it {teacher.scales}")
            student = cls(teacher, meta.first, meta.last, FlowMapForm(**meta.form), meta.card)
            student.single = meta.single
            load_beside(student, tensors, *APART)
            return student.eval().requires_grad_(False)

        return load_artifact(folder, "flow-map", FlowMapRecord, build)

    def _readme(self, name: str, trust: bool) -> str:
        typed = f"{name} --trust" if trust else name
        about = "one network that leads from any time of its trajectories to any later one, so any number of passes makes an image"
        if self.single:
            about = "one network that leads from noise to the image in one pass, trained on so that its samples have the right distribution"
        return f"""# {name}

A flow map: {about}.

{listed(self.card)}

```
fewstep sample {typed} --nfe 1 --out runs/sample
fewstep bench {typed} --nfe {"1" if self.single else "1,2,4"} --out runs/bench
```
"""
