"""The artifact: it comes back bit for bit, runs as numbers alone, and says what is wrong with it."""

import hashlib
import json
import math
import pickle
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from tests.problems import WHOLE_REGISTRY

from fewstep import (
    ArtifactError,
    DiscreteVP,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPCosine,
    VPLinear,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.models.analytic import MixtureDenoiser
from fewstep.solvers import DPMSolverPP

FILES = ["README.md", "sampler.json", "sampler.safetensors"]
LAWS = {
    "vp-linear": VPLinear(),
    "vp-cosine": VPCosine(),
    "edm": VarianceExploding(t_max=20.0),
    "flow": RectifiedFlow(shift=3.0),
    "table": DiscreteVP.linear().zero_terminal_snr(),
}


def build(name="unipc-3", law="vp-linear", **card):
    return Sampler.build(WHOLE_REGISTRY[name], make_grid("angle", LAWS[law], 5), LAWS[law], card=card)


def run(sampler, law="vp-linear"):
    denoiser = MixtureDenoiser(LAWS[law], seeded_noise([1, 2], (3,)).double(), torch.ones(2, dtype=torch.float64))
    return sample(denoiser, sampler, seeded_noise([3, 4], (3,)).double(), seeds=[3, 4])


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path) -> Path:
    return build().save(tmp_path / "sampler")


def edit(folder, **changes):
    """Other fields in ``sampler.json``; a field set to ``None`` goes."""
    meta = {**json.loads((folder / "sampler.json").read_text()), **changes}
    (folder / "sampler.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def replace_tensors(folder, data: bytes):
    """Another tensor file, with its right checksum."""
    (folder / "sampler.safetensors").write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())


# -- there and back -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "law"), [*((name, "vp-linear") for name in WHOLE_REGISTRY), *product(("unipc-3", "dpm-solver-v3"), [*LAWS][1:])]
)
@pytest.mark.every(4)
def test_round_trip(name, law, tmp_path):
    sampler = build(name, law, command="fewstep optimize", quality={"fd": 1.25})
    loaded = Sampler.load(sampler.save(tmp_path / "a" / "sampler"))
    assert listing(tmp_path / "a" / "sampler") == FILES
    for table in ("record", "update", "bias", "noise"):
        assert torch.equal(getattr(loaded.tableau, table), getattr(sampler.tableau, table))
    for ours, theirs in zip(sampler.tableau.nodes, loaded.tableau.nodes, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded.grid.t, sampler.grid.t)
    assert loaded.schedule.to_config() == sampler.schedule.to_config()
    assert (loaded.solver, loaded.options, loaded.card, loaded.nfe) == (sampler.solver, sampler.options, sampler.card, sampler.nfe)
    assert torch.equal(run(loaded, law), run(sampler, law))


def test_it_runs_without_the_code_of_its_solver(saved, monkeypatch):
    @dataclass(frozen=True)
    class Private(DPMSolverPP):
        """A solver that only this test knows."""

    def gone(*_):
        raise AssertionError("the solver's code was called")

    solver = Private(steps=3)
    sampler = Sampler.build(solver, make_grid("angle", LAWS["vp-linear"], 5), LAWS["vp-linear"])
    sampler.save(saved)
    expected = run(sampler)
    monkeypatch.setattr(DPMSolverPP, "update", gone)
    loaded = Sampler.load(saved)
    assert loaded.solver == "Private"
    assert torch.equal(run(loaded), expected)


def test_the_card_is_for_people(saved):
    build(command="fewstep optimize --nfe 5").save(saved)
    text = (saved / "README.md").read_text()
    assert "UniPC, 5 evaluations" in text
    assert "- command: fewstep optimize --nfe 5" in text
    assert "fewstep.Sampler.load" in text


def test_a_grid_with_gradients_can_be_saved(saved):
    grid = TimeGrid(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True))
    sampler = Sampler.build(make_solver("heun"), grid, LAWS["vp-linear"])
    assert torch.equal(Sampler.load(sampler.save(saved)).tableau.update, sampler.tableau.update)


def test_saving_again_replaces(saved):
    sampler = build("ddim")
    assert sampler.save(saved) == saved
    assert listing(saved) == FILES
    assert Sampler.load(saved).solver == "DDIM"


# -- damage ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sampler.json", "sampler.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"cannot read .*{name}: No such file"):
        Sampler.load(saved)


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_truncated_tensor_file_is_refused(saved, keep):
    path = saved / "sampler.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="is damaged: its checksum"):
        Sampler.load(saved)


def test_one_flipped_bit_is_refused(saved):
    path = saved / "sampler.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged: its checksum"):
        Sampler.load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("", "is damaged"), ("[1, 2]", "should hold a JSON object, not a list"), ("{}", "is None version None")],
)
def test_a_damaged_json_is_refused(saved, text, message):
    (saved / "sampler.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Sampler.load(saved)


def test_json_that_is_not_text_is_refused(saved):
    (saved / "sampler.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ArtifactError, match="is damaged"):
        Sampler.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "'fewstep-sampler' version 2; this fewstep reads 'fewstep-sampler' version 1"),
        ({"format": "fewstep-model"}, "is 'fewstep-model' version 1"),
        ({"sha256": None}, "sampler.json is damaged: sha256: field required"),
        ({"schedule": None}, "sampler.json is damaged: schedule: field required"),
        ({"schedule": {"law": "unheard-of"}}, "not a whole sampler artifact: .*unknown noise schedule"),
        ({"schedule": {"law": "discrete-vp"}}, "not a whole sampler"),
        ({"schedule": {"law": "discrete-vp", "theta": [0.0, "x"]}}, "not a whole sampler"),
        ({"schedule": {"law": "discrete-vp", "theta": [0.0, 1.0, 0.5]}}, "not a whole sampler"),
        ({"schedule": {"law": "flow", "t_max": math.nan}}, "RectifiedFlow: t_max is a number, got nan"),
        ({"schedule": {"law": "vp-linear", "beta_max": -1e9}}, "t_clean <= t_min < t_max, all finite"),
        ({"schedule": {"law": "edm", "t_max": "80"}}, "VarianceExploding: t_max is a number, got '80'"),
        ({"card": None}, "sampler.json is damaged: card: field required"),
        ({"solver": -1}, "sampler.json is damaged: solver: input should be a valid string, got '-1'"),
        ({"nfe": "x"}, "sampler.json is damaged: nfe: input should be a valid integer, got 'x'"),
        ({"nfe": 3.0}, "sampler.json is damaged: nfe: "),
        ({"nfe": True}, "sampler.json is damaged: nfe: "),
        ({"nfe": 10**400}, "sampler.json is damaged: a number of 401 digits"),
        ({"nfe": 2}, "not a whole sampler artifact: the tensor nodes.t has shape"),
        ({"nfe": 1 << 50}, "sampler.json is damaged: nfe: "),
        ({"solvr": "ddim"}, "sampler.json is damaged: solvr: unexpected keyword argument"),
        ({"card": {"name": "\ud800"}}, "sampler.json is damaged"),
    ],
)
@pytest.mark.every(2)
def test_other_json_is_refused(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ArtifactError, match=message):
        Sampler.load(saved)


def test_other_tensors_are_refused(saved):
    replace_tensors(saved, save_tensors({"grid": torch.zeros(3)}))
    with pytest.raises(ArtifactError, match="not a whole sampler artifact: there is no tensor nodes.t"):
        Sampler.load(saved)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("update", lambda table: table.long(), "the tensor update holds int64, not float64"),
        ("noise", lambda table: table[1:], r"the tensor noise has shape \[\d+\], not"),
        ("record", lambda table: table[:, :1], r"the tensor record has shape"),
        ("update", lambda table: table[:, :, :1], "the tensor update has shape .*without columns for the anchor and the state"),
        ("update", lambda table: table[..., None].expand(*table.shape, 3), "the coefficients of its tensors are of different shapes"),
        ("bias", lambda table: table + math.nan, "the tensor bias has numbers that are not finite"),
        ("nodes.lam", lambda table: table + math.nan, "the tensor nodes.lam has entries that are no numbers"),
        ("nodes.alpha", lambda table: table.float(), "the tensor nodes.alpha holds float32, not float64"),
        ("nodes.sigma", lambda table: -table, "the tensor nodes.sigma is not that of its noise law at nodes.t"),
        ("nodes.alpha", lambda table: table + 1e-3, "the tensor nodes.alpha is not that of its noise law at nodes.t"),
        ("nodes.t", lambda table: table[None], "the tensor nodes.t has shape"),
        ("grid", lambda table: torch.linspace(1, 0, 1000), "its grid has 999 steps, more than its"),
        ("grid", lambda table: table.flip(0), "times must strictly decrease"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, name, change, message):
    tensors = load_file(saved / "sampler.safetensors")
    replace_tensors(saved, save_tensors({**tensors, name: change(tensors[name]).contiguous()}))
    with pytest.raises(ArtifactError, match=f"not a whole sampler artifact: {message}"):
        Sampler.load(saved)


def test_loading_never_unpickles(saved, tmp_path):
    """Not even a pickle with the right checksum in the place of the tensors."""
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    replace_tensors(saved, pickle.dumps(Trap()))
    with pytest.raises(ArtifactError, match="not a whole sampler artifact: SafetensorError"):
        Sampler.load(saved)
    assert not trap.exists()


# -- writing --------------------------------------------------------------------------------------------------------------------------


def test_a_target_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write .*sampler.safetensors: .*; choose a folder"):
        build().save(tmp_path / "file" / "sampler")
    with pytest.raises(ArtifactError, match="cannot write"):
        build().save(tmp_path / "file")
    assert listing(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_no_card_and_no_folder_is_refused():
    with pytest.raises(SolverError, match="a card is facts by name"):
        Sampler.build("ddim", "angle", VPLinear(), nfe=4, card=5)
    with pytest.raises(ArtifactError, match="named by its path, got 5"):
        build().save(5)


def test_a_card_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ArtifactError, match="plain JSON values"):
        build(statistics=torch.zeros(3)).save(tmp_path / "sampler")
    assert listing(tmp_path) == []
