"""Guided students: models that are told their guidance scale and answer it with one call (Meng et al., arXiv 2210.03142)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.models.guidance import scale_range
from fewstep.models.model import Model
from fewstep.models.networks.beside import load_beside
from fewstep.models.networks.calls import plain_call
from fewstep.models.networks.extra_embedding import ConditionedNetwork, even
from fewstep.models.networks.scaled_call import SCALE, ScaledCall
from fewstep.runtime.artifact import ArtifactRecord, listed, load_artifact, named_path, save_artifact
from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import at_least, check_fields, checked_class

__all__ = ["GuidedForm", "form_of", "guided_model", "load_guided", "save_guided", "untold"]

EMBEDDING = f"embeddings.{SCALE}."  # the weights beside those of the network, which lie in a file of their own


@checked_class
@dataclass(frozen=True)
class GuidedForm:
    """The parts of a guided student, as options.

    Args:
        w_min: least guidance scale that it is taught.
        w_max: largest guidance scale that it is taught; others are refused.
        features: number of features of a scale.
        insert_at: submodule of the network whose output is its time embedding; known of the usual ones.

    Raises:
        FewstepError: scales that are no range, or a number out of range.
    """

    w_min: float = 1.0
    w_max: float = 4.0
    features: int = 16
    insert_at: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, features=2)
        even(self.features)
        scale_range((self.w_min, self.w_max))


@dataclass(frozen=True)
class GuidedRecord(ArtifactRecord):
    """The fields of ``guided.json``: the form and provenance."""

    FORMAT = "fewstep-guided"

    form: dict[str, Any]
    card: dict[str, Any]


def guided_model(teacher: Model, form: GuidedForm, network: ConditionedNetwork | None = None) -> Model:
    """Return a model whose network is told its guidance scale. New, it is the conditional teacher at every scale, to the bit.

    Args:
        teacher: the model to begin with; its network gets a hook, so pass a copy.
        form: its parts.
        network: the network, where it was made before.

    Raises:
        ModelError: a network that is no module, or does not say where its time is embedded; a pipeline, whose call guides by itself.
    """
    if teacher.conditional is not teacher:
        raise ModelError(
            f"{teacher.name} is a pipeline, which guides by itself: only a model of one network can be told its guidance scale, as "
            "fewstep.load_model(folder) or a fewstep.Model of a network of your own"
        )
    if not isinstance(teacher.network, nn.Module):
        raise ModelError(f"{teacher.name} is a function, which cannot be trained: make the Model of a torch.nn.Module")
    if network is None:
        network = ConditionedNetwork(teacher.network, teacher.call or plain_call, form.insert_at).tell(SCALE, form.features)
    scales = (form.w_min, form.w_max)
    made = teacher.with_network(network, call=ScaledCall(form.w_max, form.features), scales=scales, null_label=None)
    return replace(made, call=ScaledCall(form.w_max, form.features, made.default_guidance))


def form_of(model: Model) -> GuidedForm:
    """Return the form of a model that is told its scale: one that `guided_model` made."""
    network, call = model.network, model.call
    assert model.scales is not None and isinstance(network, ConditionedNetwork) and isinstance(call, ScaledCall)  # made so
    return GuidedForm(*model.scales, call.features, network.insert_at)


def untold(model: Model, network: nn.Module | None = None) -> Model:
    """Return the model around the network inside one that is told its scale, or around another of its kind; any other model as it is."""
    told: Any = model.network
    if model.scales is None or not isinstance(told, ConditionedNetwork):
        return model if network is None else model.with_network(network)
    call = None if told.call is plain_call else told.call
    return replace(model, network=told.network if network is None else network, call=call, scales=None)


def save_guided(network: ConditionedNetwork, form: GuidedForm, card: Mapping[str, Any], folder: str | Path, *, trust: bool = False) -> Path:
    """Write ``guided.json``, ``guided.safetensors`` and a card; the network itself is saved beside them by `save_like`.

    What the network is told beside its scale, as a flow map the time that it leads to, is saved by others.

    Args:
        network: with the embedding of its scale.
        form: its parts.
        card: provenance; with ``steps``, the student is sampled by these alone.
        folder: of the model.
        trust: whether it names code to import, for the commands of the card.

    Raises:
        ArtifactError: the folder cannot be written, or the card is not JSON-able.
    """
    folder = named_path(folder)
    tensors = {name: value for name, value in network.state_dict().items() if name.startswith(EMBEDDING)}
    return save_artifact(folder, "guided", {"form": asdict(form), "card": dict(card)}, tensors, _readme(folder.name, form, card, trust))


def load_guided(folder: str | Path, teacher: Model) -> Model:
    """Load a student that `save_guided` wrote, around the model of the same folder.

    Raises:
        ArtifactError: a file is missing, damaged or of another version.
    """

    def build(meta: GuidedRecord, tensors: dict[str, Tensor]) -> Model:
        model = guided_model(teacher, GuidedForm(**meta.form))
        assert isinstance(model.network, nn.Module)  # made so
        load_beside(model.network, tensors, "network.")
        model.network.eval().requires_grad_(False)
        return model

    return load_artifact(folder, "guided", GuidedRecord, build)


def _readme(name: str, form: GuidedForm, card: Mapping[str, Any], trust: bool) -> str:
    typed = f"{name} --trust" if trust else name
    options = "" if "steps" in card else " --solver unipc-2 --nfe 8"  # one of few steps has times of its own
    scale = min(max(2.0, form.w_min), form.w_max)
    return f"""# {name}

A guided student: it is told the guidance scale, from {form.w_min:g} to {form.w_max:g}, and answers with one call of its network.

{listed(card)}

```
fewstep sample {typed} --guidance {scale:g}{options} --out runs/sample
fewstep bench {typed} --guidance {scale:g} --out runs/bench
```
"""
