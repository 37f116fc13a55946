"""Fits that are killed and continued, what is refused, given trajectories, and several processes."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from tests.learn.samplers.test_fit import LAW, ORDER, SCALAR, SWEPT, TINY, contents, made, network, same, toy

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    ModelError,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    load_model,
)
from fewstep.learn.samplers import fit as module
from fewstep.learn.samplers import fit_search
from fewstep.learn.samplers.fit import FitConfig, nfe_folder
from fewstep.learn.search.coefficients import FitForm
from fewstep.learn.teacher.gram import fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.formats.folders import save_ours


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody killed, and its calls of the network."""
    folder = tmp_path_factory.mktemp("whole")
    made(folder, model := toy(), (2, 3))
    return folder, network(model).calls


def no_scratch(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("note", "kept"),
    [
        ("32 of 48 trajectories", set()),
        pytest.param("2 evaluations: fit in sequence", {"trajectories"}, marks=pytest.mark.slow),
        ("3 evaluations: sweep 1 of at most 2", {"trajectories", "nfe-02", "README.md"}),
    ],
)
def test_a_killed_run_continues_to_the_same_files(tmp_path: Path, whole: tuple[Path, int], note: str, kept: set[str]) -> None:
    def mortal(done: int, said: str) -> None:
        if said == note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(), (2, 3), observe=mortal)
    assert {path.name for path in tmp_path.iterdir()} == (kept or {"trajectories"}) and no_scratch(tmp_path)
    assert (tmp_path / "trajectories" / "manifest.json").exists() == bool(kept)
    made(tmp_path, model := toy(), (2, 3))
    assert contents(tmp_path) == contents(whole[0]) and network(model).calls < whole[1]


@pytest.mark.parametrize("where", [pytest.param(0.02, marks=pytest.mark.slow), 0.8])  # trajectories, the second sampler
def test_a_run_killed_in_the_network_leaves_nothing_half_made(tmp_path: Path, whole: tuple[Path, int], where: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(stop=int(where * whole[1])), (2, 3))
    assert no_scratch(tmp_path)
    for path in tmp_path.glob("nfe-*"):
        assert same(Sampler.load(path).tableau, Sampler.load(whole[0] / path.name).tableau)
    made(tmp_path, toy(), (2, 3))
    assert contents(tmp_path) == contents(whole[0])


def test_what_a_run_that_could_not_clean_up_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".students-dead").mkdir()
    (tmp_path / ".students-dead" / "x-0.safetensors").write_bytes(b"cut")
    made(tmp_path, toy(), (1,), replace(TINY, iterations=0))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "trajectories", "nfe-01"} and no_scratch(tmp_path)


def test_a_finished_folder_is_only_read(whole: tuple[Path, int]) -> None:
    before = contents(whole[0])
    found = made(whole[0], model := toy(), (3, 2))
    assert network(model).calls == 0 and contents(whole[0]) == before
    for nfe, one in found.items():
        assert same(one.sampler.tableau, Sampler.load(nfe_folder(whole[0], nfe)).tableau)
        assert one.stages == {name: tuple(pair) for name, pair in one.sampler.card["stages"].items()} and len(one.stages) == 3


def test_more_evaluations_can_be_added(tmp_path: Path, whole: tuple[Path, int]) -> None:
    made(tmp_path, toy(), (2,))
    first, shards = contents(tmp_path / "nfe-02"), contents(tmp_path / "trajectories")
    made(tmp_path, model := toy(), (2, 3))
    assert contents(tmp_path / "nfe-02") == first and contents(tmp_path / "trajectories") == shards
    assert contents(tmp_path) == contents(whole[0]) and network(model).calls < 0.8 * whole[1]
    made(tmp_path, toy(), (1,))
    readme = (tmp_path / "README.md").read_text()
    assert re.findall(r"^\| (\d+) \|", readme, re.M) == ["1", "2", "3"]  # the card is of all that is there


def test_other_work_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    made(tmp_path, toy(classes=2))
    before = contents(tmp_path)
    other = VarianceExploding(0.05, 20.5)
    requests = [(toy(other, classes=2), TINY, 1.0), (toy(), TINY, 1.0), (toy(classes=2), TINY, 2.0)]
    for changes in (
        {"num": 40},
        {"held_out": 24},
        {"num": 24, "held_out": 24},
        {"levels": 12},
        {"seed": 4},
        {"iterations": 3},
        {"batch": 4},
    ):
        requests.append((toy(classes=2), replace(TINY, **changes), 1.0))
    for form in (SCALAR, FitForm(ridge=1e-5)):
        requests.append((toy(classes=2), replace(TINY, form=form), 1.0))
    for model, config, guidance in requests:
        for nfe in ((2,), (1, 2), (1,)):  # also before others are made, and where only others are asked for
            with pytest.raises(ArtifactError, match=r"(another|other) .*(remove it|use another folder)"):
                made(tmp_path, model, nfe, config, guidance=guidance)
        assert network(model).calls == 0
    assert contents(tmp_path) == before
    made(tmp_path, model := toy(classes=2), guidance=1)  # the same number as 1.0
    assert network(model).calls == 0 and contents(tmp_path) == before
    (tmp_path / "nfe-02" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        made(tmp_path, toy(classes=2))


def test_trajectories_of_another_fit_are_not_mixed_in(tmp_path: Path) -> None:
    """Where no sampler was made before the run was killed."""
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(stop=40))
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="another teacher or request .*: remove it .*or use another folder"):
        made(tmp_path, toy(), config=replace(TINY, levels=12))
    assert contents(tmp_path) == before and before


def test_mistakes_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for error, says, request in [
        (SolverError, "takes 1 to 16 evaluations, got none", {"nfe": ()}),
        (SolverError, "takes 1 to 16 evaluations, got 0, 3", {"nfe": (3, 0)}),
        (SolverError, "takes 1 to 16 evaluations, got -1", {"nfe": (-1,)}),
        (SolverError, "takes 1 to 16 evaluations, got 2, 17", {"nfe": (2, 17)}),
        (SolverError, "takes 1 to 5 evaluations, got 6", {"model": toy(DiscreteVP.linear(6)), "nfe": (6,)}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file"}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file" / "below"}),
        (FewstepError, "finite guidance", {"guidance": float("nan"), "model": toy(classes=2)}),
    ]:
        asked = {"folder": tmp_path / "new", "model": toy(), **request}
        with pytest.raises(error, match=says):
            made(**asked)
        assert network(asked["model"]).calls == 0 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, window=4), replace(TINY, noises=4), replace(TINY, held_out=4), replace(TINY, num=4)]
)
def test_more_processes_than_noises_are_refused_before_any_work(tmp_path: Path, monkeypatch, config: FitConfig) -> None:
    least = min(config.num, config.held_out, config.noises, config.window)
    monkeypatch.setattr(module, "process", lambda: (0, least + 1))
    with pytest.raises(FewstepError, match=f"{least + 1} processes cannot share {least} noises: use fewer processes"):
        made(tmp_path / "new", model := toy(), config=config)
    assert network(model).calls == 0 and not (tmp_path / "new").exists()


def test_a_network_that_is_not_finite_is_named_and_leaves_nothing_half_made(tmp_path: Path, whole: tuple[Path, int]) -> None:
    given = Trajectories.load(whole[0] / "trajectories")
    with pytest.raises(ModelError, match="not finite .* at evaluation 5 of 16"):
        made(tmp_path, toy(bad=5))
    assert contents(tmp_path) == {}
    for bad in (3, 36, 50, 80, 100, 130):  # the moments, and all through the fit that follows
        with pytest.raises(FewstepError, match="not finite.*: check (the network|its weights)"):
            made(tmp_path, toy(bad=bad), trajectories=given)
        assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num": 1}, FewstepError, "at least 2 trajectories"),
        ({"held_out": 1}, FewstepError, "2 held out"),
        ({"noises": 1}, FewstepError, "2 noises"),
        ({"window": 1}, FewstepError, "2 in a window"),
        ({"batch": 0}, FewstepError, "a batch of 1"),
        ({"levels": 0}, FewstepError, "1 level"),
        ({"iterations": -1}, FewstepError, "no negative number"),
        ({"seed": -1}, FewstepError, "no negative number"),
        ({"seed": 2**63 - 10}, FewstepError, "seeds must lie between 0 and 2\\^63"),
        ({"parent": "dpm-solver-p"}, SolverError, "unknown solver 'dpm-solver-p': did you mean"),
        ({"parent": "unipc-2"}, SolverError, "a fit starts from a solver that .*: dpm-solver-pp-2m"),
        ({"parent": "ddim:eta=1"}, SolverError, "without noise"),
        ({"parent": "deis-3"}, SolverError, "a fit starts from a solver that"),
        ({"parent": "heun"}, SolverError, "a fit starts from a solver that"),
        ({"parent": "dpm-solver-v3"}, SolverError, "statistics"),
        ({"parent": "dpm-solver-pp-3m", "form": FitForm(history=2)}, SolverError, "by at most 2 outputs"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        FitConfig(**options)
    assert "\n" not in str(caught.value)


def test_parents_that_a_fit_can_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_search, "HAND_MADE", ("dpm-solver-pp-2m",))  # what is chosen here is the fit
    for parent, history in (("ddim", None), ("dpm-solver-pp-3m", 3), ("unipc-2:corrector=false", None), ("dpm-solver-pp-2m", 1)):
        config = replace(TINY, parent=parent, form=FitForm(history=history), iterations=0, num=16, levels=8)
        one = made(tmp_path / parent, toy(), (4,), config)[4].sampler
        assert one.tableau.memory == (history or 4) and one.card["error"][0] < one.card["error"][1]
        assert one.options["parent"] == ("ddim" if history == 1 else parent)  # no room for more than one output


# -- given trajectories, batches, processes --------------------------------------------------------------------------


def test_given_trajectories_are_fitted_to(tmp_path: Path, whole: tuple[Path, int]) -> None:
    given = Trajectories.load(whole[0] / "trajectories")
    found = made(tmp_path / "new", model := toy(), (2, 3), trajectories=given)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"README.md", "nfe-02", "nfe-03"}
    assert network(model).calls < whole[1]
    for nfe, one in found.items():
        assert same(one.sampler.tableau, Sampler.load(nfe_folder(whole[0], nfe)).tableau)
    made(tmp_path / "new", model := toy(), (2, 3), trajectories=given)
    assert network(model).calls == 0


def test_given_trajectories_that_do_not_suit_are_refused(tmp_path: Path, whole: tuple[Path, int]) -> None:
    given, inner = Trajectories.load(whole[0] / "trajectories"), TimeGrid(fine_grid(LAW, 16).t[:-1])
    short = generate_trajectories(toy(), inner, TrajectoryConfig(48, 16, batch=16), tmp_path / "short")
    for error, says, request in [
        (ArtifactError, "trajectories of model", {"model": toy(VarianceExploding(0.05, 20.5))}),
        (ArtifactError, "trajectories of guidance 1.0, but they are used with guidance 2.0", {"guidance": 2.0}),
        (
            FewstepError,
            "48 trajectories are fewer than 32 to fit to and 17 held out: ask for fewer",
            {"config": replace(TINY, held_out=17)},
        ),
        (SolverError, "takes 1 to 16 evaluations, got 17", {"nfe": (17,)}),
        (FewstepError, "a fit takes trajectories from 20 to 0.05", {"trajectories": short}),
    ]:
        with pytest.raises(error, match=says):
            made(tmp_path / "new", **{"model": toy(), "trajectories": given, **request})
        assert not (tmp_path / "new").exists()


def test_the_size_of_batches_does_not_matter(tmp_path: Path, whole: tuple[Path, int]) -> None:
    """States are float32, so sums in another order differ by rounding."""
    given = Trajectories.load(whole[0] / "trajectories")
    one, two = (made(tmp_path / str(batch), toy(), (3,), replace(TINY, batch=batch), trajectories=given)[3] for batch in (5, 32))
    assert one.sampler.card["chosen"] == two.sampler.card["chosen"] and one.sampler.card["levels_from"] == two.sampler.card["levels_from"]
    assert one.stages.keys() == two.stages.keys()
    for name, pair in one.stages.items():
        assert two.stages[name] == pytest.approx(pair, rel=SWEPT if name == "swept" else ORDER)


UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_ours(tmp_path / "model", UNet2DModel(**UNET), "edm(0.5)", LAW, (1, 4, 4), None)
    words = [str(tmp_path / "model"), "--nfe", "2,3", "-n", "32", "--held-out", "16", "--iterations", "2", "--batch", "8", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        environment, out = {**os.environ, "OMP_NUM_THREADS": "1"}, str(tmp_path / count)
        command = [*torchrun, count, "-m", "fewstep", "fit", *words, out]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=600)
    assert {path.name for path in (tmp_path / "2").iterdir()} == {"README.md", "trajectories", "nfe-02", "nfe-03"}
    for nfe in (2, 3):
        one, two = (Sampler.load(nfe_folder(tmp_path / count, nfe)) for count in ("1", "2"))
        for key in ("chosen", "levels_from", "best_hand_made", "network_evaluations", "model", "identity"):
            assert one.card[key] == two.card[key]
        assert one.card["stages"].keys() == two.card["stages"].keys()
        for name, pair in one.card["stages"].items():
            assert two.card["stages"][name] == pytest.approx(pair, rel=SWEPT if name == "swept" else ORDER)
    assert load_model(tmp_path / "model").fingerprint == Sampler.load(tmp_path / "2" / "nfe-02").card["model"]
