"""Models of one's own network in folders: saved by the names of their code, and loaded for those who trust it."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import own_networks
from tests.own_networks import LAW, TableNet, Tied, stacked, table_model
from tests.problems import contents, names

import fewstep
from fewstep import ArtifactError, Model, ModelError, RectifiedFlow, VarianceExploding, VPLinear, load_model
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.formats import folders
from fewstep.models.networks.calls import NetworkTime, edm_time

TIED = {"build": Tied, "shape": (3,)}


def tied(**given: Any) -> Model:
    torch.manual_seed(0)
    return Model(Tied().eval(), VarianceExploding(), "sample", **{**TIED, **given})


def sequence(**given: Any) -> Model:
    torch.manual_seed(0)
    facts = {"shape": (3,), "build": functools.partial(stacked, width=5), "call": own_networks.of_state}
    return Model(stacked(5).eval(), RectifiedFlow(), "flow", **{**facts, **given})


SAVED: dict[str, Callable[[], Model]] = {
    "whole times and labels": table_model,
    "arguments in tuples": lambda: Model(
        TableNet(4, sides=(2, 3)).eval(),
        LAW,
        "v",
        shape=(2, 3),
        time_dtype=torch.int64,
        build=functools.partial(TableNet, width=4, sides=(2, 3)),
    ),
    "a class without arguments": lambda: tied(build=None),
    "a function that builds": sequence,
    "a call with arguments": lambda: sequence(call=functools.partial(own_networks.of_state, scale=0.5)),
    "a time of its own": lambda: replace(tied(), schedule=VPLinear(), time=own_networks.thousandths),
    "EDM's time": lambda: replace(tied(), time=edm_time, prediction="edm(0.5)"),
    "a time as data": lambda: replace(tied(), schedule=RectifiedFlow(3.0), time=NetworkTime("sigma", 1000.0, 1.0, RectifiedFlow(3.0))),
    "dtypes": lambda: tied(dtype=torch.float32, time_dtype=torch.float64),
    "bfloat16": lambda: replace(tied(), network=Tied().eval().bfloat16()),
    "an identity": lambda: tied(identity="my-model-v3", data="digits"),
    "a law to the clean image": lambda: replace(table_model(), schedule=LAW.to_clean()),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_model_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model, before = SAVED[kind](), torch.random.get_rng_state()
    assert model.save(str(tmp_path / "saved")) == tmp_path / "saved"
    loaded = load_model(tmp_path / "saved", trust=True)
    assert torch.equal(torch.random.get_rng_state(), before)  # though the network was built twice
    assert names(tmp_path / "saved") == {"fewstep.json", "network.safetensors"} and loaded.folder == tmp_path / "saved"
    assert loaded.fingerprint == model.fingerprint and loaded.name == "saved"
    facts = ("shape", "classes", "null_label", "dtype", "time_dtype", "identity", "data")
    assert [getattr(loaded, fact) for fact in facts] == [getattr(model, fact) for fact in facts]
    assert not loaded.network.training and not any(weight.requires_grad for weight in loaded.network.parameters())
    assert [value.dtype for value in loaded.network.state_dict().values()] == [value.dtype for value in model.network.state_dict().values()]
    made = [fewstep.sample(one, "unipc-2", nfe=3, seeds=range(2)) for one in (model, loaded)]
    assert torch.equal(*made) and bool(torch.isfinite(made[0]).all())
    loaded.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "saved")


def test_tied_weights_stay_tied_and_buffers_follow_the_dtype(tmp_path: Path) -> None:
    model = tied()
    model.network.bfloat16()
    model.save(tmp_path / "saved")
    network = load_model(tmp_path / "saved", trust=True).network
    assert network.second.weight is network.first.weight and network.ones.dtype == torch.bfloat16


def test_a_fitted_sampler_fits_the_loaded_model(tmp_path: Path) -> None:
    model = table_model()
    config = fewstep.FitConfig(num=8, held_out=4, levels=6, noises=4, iterations=0, batch=4)
    sampler = fewstep.fit(model, nfe=2, config=config)[2]
    model.save(tmp_path / "saved")
    assert fewstep.sample(load_model(tmp_path / "saved", trust=True), sampler, seeds=[0]).shape == (1, 1, 4, 4)


def test_a_network_of_a_known_class_is_saved_by_its_description(tmp_path: Path) -> None:
    model = load_model("digits-edm")
    model.save(tmp_path / "copy")
    assert load_model(tmp_path / "copy").fingerprint == model.fingerprint  # without trust
    assert load_model(tmp_path / "copy").fitted(5).nfe == 5


def test_what_a_model_carries_is_saved_with_it(tmp_path: Path) -> None:
    config = fewstep.FinetuneConfig(nfe=2, rounds=1, steps=2, batch=4, num=8, held_out=4, levels=6, teacher_nfe=8)
    student = fewstep.finetune(table_model(), config=config)
    student.save(tmp_path / "student")
    loaded = load_model(tmp_path / "student", trust=True)
    assert loaded.fingerprint == student.fingerprint and loaded.tuned == student.tuned
    assert torch.equal(fewstep.sample(loaded, seeds=[1]), fewstep.sample(student, seeds=[1]))


# -- trust -----------------------------------------------------------------------------------------------------------


def test_code_is_imported_for_those_who_trust_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_network.py").write_text(
        "import pathlib, torch\npathlib.Path('it ran').touch()\nclass Net(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(3, 3)\n    def forward(self, x, t):\n        return super().forward(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import their_network  # type: ignore[import-not-found]

    Model(their_network.Net().eval(), VarianceExploding(), "sample", shape=(3,)).save("saved")
    del sys.modules["their_network"]
    Path("it ran").unlink()
    with pytest.raises(
        ModelError, match="saved holds a network of someone's own code, their_network:Net, and .* trust=True.*, or say --trust"
    ):
        load_model("saved")
    assert not Path("it ran").exists()
    assert load_model("saved", trust=True).shape == (3,) and Path("it ran").exists()
    del sys.modules["their_network"]


def test_all_code_of_a_folder_is_named_when_it_is_refused(tmp_path: Path) -> None:
    replace(sequence(), time=own_networks.thousandths).save(tmp_path / "saved")
    with pytest.raises(ModelError, match="own_networks:stacked and .*own_networks:thousandths and .*own_networks:of_state"):
        load_model(tmp_path / "saved")


# -- what cannot be saved --------------------------------------------------------------------------------------------


def inside() -> type[torch.nn.Module]:
    class Inside(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)

    return Inside


class Scripted(Tied):
    pass


Scripted.__module__ = "__main__"


class Stateful(Tied):
    def get_extra_state(self) -> str:
        return "more"

    def set_extra_state(self, state: str) -> None:
        pass


def loud() -> torch.nn.Module:
    network = Tied()
    network.loudness = 3
    return network.eval()


REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "arguments that nobody named": (
        lambda: table_model(width=4, build=None),
        "the weights do not fit what .*TableNet builds: the file has time.weight of",
    ),
    "arguments that are needed": (
        lambda: Model(torch.nn.Linear(3, 3), VarianceExploding(), "sample", shape=(3,)),
        "Linear cannot be built again without arguments .*: make the Model with build=functools.partial",
    ),
    "other arguments": (lambda: table_model(build=functools.partial(TableNet, width=4)), "the file has .* make the Model with build="),
    "another setting": (
        lambda: replace(tied(), network=loud()),
        "built again, its network differs in network.loudness: make the Model with",
    ),
    "other dropout": (lambda: table_model(build=functools.partial(TableNet, width=8)), "its network differs in network.dropout"),
    "a lambda that builds": (
        lambda: table_model(build=lambda: TableNet()),
        "build is a lambda, which has no name to import it by: write it as",
    ),
    "a class inside a function": (
        lambda: replace(tied(), network=inside()(), build=None),
        "is Inside, made inside a function, which has no",
    ),
    "a class of the script": (lambda: replace(tied(), network=Scripted(), build=None), "is Scripted of the script that is running"),
    "a class that was replaced": (
        lambda: replace(tied(), network=type("Tied", (Tied,), {"__module__": Tied.__module__})(), build=None),
        "is not what tests.own_networks:Tied is now",
    ),
    "arguments without names": (lambda: table_model(build=functools.partial(TableNet, 8)), "arguments that have no names: give them as"),
    "arguments that are no JSON": (
        lambda: table_model(build=functools.partial(TableNet, width=8, dropout=torch.tensor(0.1))),
        "build: its argument dropout is a Tensor: only numbers, words",
    ),
    "an argument that is not finite": (
        lambda: table_model(build=functools.partial(TableNet, dropout=float("nan"))),
        "dropout is nan, which no JSON",
    ),
    "what builds no module": (lambda: replace(tied(), build=own_networks.no_network), "no_network returned a int, not a torch.nn.Module"),
    "what cannot be built": (lambda: table_model(build=functools.partial(TableNet, depth=2)), "TableNet built no network: TypeError: "),
    "a lambda for the time": (lambda: replace(tied(), time=lambda t: 2 * t), "time is a lambda, which has no name to import it by"),
    "a lambda for the call": (lambda: replace(tied(), call=lambda net, x, t, cond: net(x, t)), "call is a lambda, which has no name"),
    "a method for the call": (lambda: replace(tied(), call=Tied().forward), "call is not what tests.own_networks:Tied.forward is now"),
    "an object for the call": (lambda: replace(tied(), call=Tied()), "call is an object of the class Tied, which has no name"),
    "a function as network": (lambda: replace(tied(), network=own_networks.thousandths), "is a function, which has no weights to save"),
    "no shape": (lambda: replace(tied(), shape=None), "does not know the shape of its samples"),
    "state beside the weights": (lambda: replace(tied(), network=Stateful(), build=Stateful), "_extra_state of its state is no tensor"),
    "weights without values": (lambda: replace(tied(), network=Tied().to("meta"), identity="x"), "weight .* is on the meta device"),
    "a flow map": (lambda: replace(table_model(), flow_map=FirstOrderMap(table_model())), "is a flow map of your own code"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.every(2)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    make, says = REFUSED[kind]
    with pytest.raises(ModelError, match=says):
        make().save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_build_that_is_none_is_refused_at_birth() -> None:
    for build in (5, "own_networks:Tied", Tied()):
        with pytest.raises(ModelError, match="build is what builds the network again, as functools.partial"):
            tied(build=build)


def test_a_folder_with_a_model_is_not_written_over(tmp_path: Path) -> None:
    tied().save(tmp_path / "saved")
    before = contents(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="saved already holds a model, which would be lost: choose another folder"):
        table_model().save(tmp_path / "saved")
    assert contents(tmp_path / "saved") == before


def test_a_killed_save_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = folders.write_whole, 0

    def killed(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(folders, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        tied().save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    monkeypatch.undo()
    tied().save(tmp_path / "saved")


# -- folders that were changed ---------------------------------------------------------------------------------------


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another network": (
        lambda meta: meta["network"].update(name="tests.own_networks:TableNet"),
        "weights do not fit what .*TableNet builds",
    ),
    "a network that is not there": (
        lambda meta: meta["network"].update(name="tests.own_networks:Gone"),
        "cannot import tests.own_networks:Gone",
    ),
    "a module that is not there": (lambda meta: meta["network"].update(name="no_such_module:Net"), "cannot import no_such_module:Net"),
    "a name that is none": (lambda meta: meta["network"].update(name="Tied"), "names no function: say module:function"),
    "a number": (lambda meta: meta["network"].update(name="tests.own_networks:CLASSES"), "CLASSES is not a function but a int"),
    "arguments it lacks": (lambda meta: meta["network"].update(options={"width": 3}), "Tied built no network: TypeError"),
    "another checksum": (lambda meta: meta.update(sha256="0"), "are damaged: their checksum is not the one there"),
    "a dtype that is none": (lambda meta: meta.update(dtype="nn"), "'nn' is no dtype"),
    "a dtype that is not there": (lambda meta: meta.update(dtype="float7"), "does not describe a model"),
    "a law that is none": (lambda meta: meta.update(schedule={"law": "mine"}), "noise schedule 'mine'"),
    "a form of time that is none": (lambda meta: meta["time"].update(form="clock"), "form of a network's time"),
    "a word for a shape": (lambda meta: meta.update(shape="3"), "is damaged: shape"),
    "more than there is": (lambda meta: meta.update(more=1), "is damaged: more"),
    "less than there is": (lambda meta: meta.pop("call"), "is damaged: call"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_folder_is_refused(change: str, tmp_path: Path) -> None:
    tied().save(tmp_path / "saved")
    path = tmp_path / "saved" / "fewstep.json"
    meta = json.loads(path.read_text())
    CHANGED[change][0](meta)
    path.write_text(json.dumps(meta))
    with pytest.raises((ModelError, ArtifactError), match=CHANGED[change][1]) as error:
        load_model(tmp_path / "saved", trust=True)
    assert "fewstep.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["cut", "gone", "another number"])
def test_changed_weights_are_refused(change: str, tmp_path: Path) -> None:
    tied().save(tmp_path / "saved")
    path = tmp_path / "saved" / "network.safetensors"
    data = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(data[:-5] if change == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match="cannot read .*network.safetensors|the weights beside .*fewstep.json are damaged"):
        load_model(tmp_path / "saved", trust=True)
