"""The README and the guides: every Python block runs as it is written, every table is what its rows say, every figure in a sentence too."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gain_picture import SHOWN, lines, numbers
from benchmarks.tables import BLOCK, filled
from benchmarks.terminal_recording import COMMANDS, draw
from benchmarks.topics.rows import least
from tests.integrations.diffusers.tiny_pipelines import load, make
from tests.problems import reflected_model

import fewstep
from fewstep.evaluate.stochastic.rows import NoiseRow, read_noise_results
from fewstep.evaluate.stochastic.verdict import contests
from fewstep.sampling.start import level_of

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    f"docs/{name}.md"
    for name in (
        "own-network",
        "migration",
        "comfyui",
        "export",
        "distilled",
        "manual-stepping",
        "splitting",
        "strength",
        "reflected",
        "solvers",
    )
)
LONGER = (
    "index",
    "choose",
    "adapters",
    "parallel",
    "restore",
    "inspect",
    "fitted",
    "schedules",
    "statistics",
    "dsno",
    "flow-maps",
    "guided",
    "matching",
    "report",
    "noise",
    "extending",
)  # they learn or compare
LONG = ("README.md", *(f"docs/{name}.md" for name in LONGER))
ROWS = ROOT / "benchmarks" / "results"
QUICK = {
    "FitConfig": {"num": 16, "held_out": 8, "noises": 8, "levels": 12, "iterations": 0},
    "CalibrationConfig": {"num": 8, "levels": 8},
    "OptimizeConfig": {"levels": 12, "num": 4, "noises": 8, "held_out": 8, "iterations": 1},
    "DistillConfig": {"num": 8, "held_out": 4, "steps": 2, "batch": 4},
}
STUDENT = {"held_out": 4, "steps": 2, "batch": 4}  # of the configurations that guides of students write down


MY_NETWORKS = """import torch


class Net(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(8, 8)

    def forward(self, x, t):
        return super().forward(x)
"""


class Unet(torch.nn.Module):
    def forward(self, x: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor) -> object:
        return type("Output", (), {"sample": 0.1 * x})


def run_blocks(page: str, names: dict[str, Any]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners whose guides leave the configuration out take a small one, and comparisons few noises."""
    learners = {"fit": "FitConfig", "calibrate": "CalibrationConfig", "optimize": "OptimizeConfig", "distill": "DistillConfig"}
    for verb, config in learners.items():
        function, small = getattr(fewstep, verb), getattr(fewstep, config)(**QUICK[config])
        call = lambda *args, function=function, small=small, **options: function(*args, **{"config": small, **options})  # noqa: E731
        monkeypatch.setattr(fewstep, verb, call, raising=False)
    for config in ("FlowMapConfig", "GuidedConfig", "ProgressiveConfig"):
        monkeypatch.setattr(
            fewstep,
            config,
            partial(getattr(fewstep, config), **STUDENT, **({"num": 8} if config == "FlowMapConfig" else {})),
            raising=False,
        )
    for config in ("MatchingConfig", "EMConfig"):
        small = partial(getattr(fewstep, config), **{**STUDENT, "held_out": 8}, updates=1, before=1, measures=1)
        monkeypatch.setattr(fewstep, config, small, raising=False)
    compare = fewstep.compare
    monkeypatch.setattr(fewstep, "compare", lambda *args, **options: compare(*args, **{**options, "num": 8}), raising=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, while they load and save
def test_the_guide_to_pipelines_runs_and_its_fit_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load(make("sd", tmp_path)).save_pretrained("path/to/pipeline")
    names: dict[str, Any] = {}
    run_blocks("docs/diffusers.md", names)
    errors = names["errors"]
    best = min(error for kind, error in errors.items() if kind != "fitted")
    assert errors["fitted"] <= 0.6 * best  # measured 0.1 to 0.3


@pytest.mark.usefixtures("short_reference", "quick")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", [*PAGES, *(pytest.param(page, marks=pytest.mark.slow) for page in LONG)])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "docs/reflected.md":
        reflected_model().save(tmp_path / "runs" / "reflected")
    (tmp_path / "assets").symlink_to(ROOT / "assets")  # of the repository, where a reader of it is
    if page == "docs/own-network.md":
        (tmp_path / "my_networks.py").write_text(MY_NETWORKS)
        monkeypatch.syspath_prepend(tmp_path)
    schedule = fewstep.DiscreteVP.scaled_linear()
    names: dict[str, Any] = {
        "torch": torch,
        "fewstep": fewstep,
        "my_network": lambda x, time: 0.1 * x,
        "my_unet": lambda x, time: 0.1 * x,
        "class_net": lambda x, time, cond: 0.1 * x,
        "net": lambda x, time: 0.1 * x,
        "unet": Unet(),
        "schedule": fewstep.RectifiedFlow(),
        "empty_prompt_embedding": torch.zeros(7, 5),
        "prompt_embeddings": torch.randn(4, 7, 5),
        "level": 1.0,
        "threes": torch.zeros(4, 1, 8, 8),
        "noise": torch.randn(4, 1, 8, 8),
        "eights": torch.full((4,), 8),
    }
    if page in ("README.md", "docs/index.md"):
        make("sd", tmp_path)
        names["pipe"] = load(tmp_path / "sd")
    run_blocks(page, names)
    if page == "docs/extending.md":
        sampler = fewstep.Sampler.build(names["TwoStep"](), "angle", schedule, nfe=5)
        assert sampler.tableau.memory == 2


def test_the_reference_has_every_public_name_once() -> None:
    basic, advanced = (
        re.findall(r"^::: (\S+)$", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.M) for page in ("api", "api-advanced")
    )
    assert len({*basic, *advanced}) == len(basic) + len(advanced)
    assert {f"fewstep.{name}" for name in fewstep.__all__} <= {*basic, *advanced}


def test_the_terminal_is_drawn_from_its_record() -> None:
    recorded = json.loads((ROOT / "docs" / "terminal.json").read_text(encoding="utf-8"))
    assert [part["command"] for part in recorded] == list(COMMANDS)
    assert (ROOT / "docs" / "terminal.svg").read_text(encoding="utf-8") == draw(recorded)


def test_pictures_of_the_page_are_small() -> None:
    page = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((page[\w-]*\.png)\)", page)
    assert set(pictures) == {path.name for path in (ROOT / "docs").glob("page*.png")} and len(pictures) >= 2
    assert all((ROOT / "docs" / name).stat().st_size <= 150_000 for name in (*pictures, "terminal.svg"))


def test_the_contraction_of_the_guide_to_strengths() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \|(.*)\|$", (ROOT / "docs/strength.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 5
    for strength, level, factors in rows:
        s = level_of(float(strength))
        assert level == f"{s:.3g}"
        assert [one.strip() for one in factors.split("|")] == [f"{(c / (c + s**2)) ** 0.5:.3f}" for c in (1, 0.25, 0.01)]


# -- figures ------------------------------------------------------------------------------------------------------------


WITH_TABLES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(path.read_text("utf-8"))]


@pytest.mark.parametrize("path", WITH_TABLES, ids=lambda path: path.name)
def test_tables_are_what_their_rows_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert filled(text) == text, f"run: python -m benchmarks.tables fill {path.relative_to(ROOT)}"


def test_pages_with_measured_tables_say_how_they_are_made() -> None:
    """A table with figures of errors is printed by a command, or the page is filled by the study on CIFAR-10."""
    assert len(WITH_TABLES) == 23
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        bare = BLOCK.sub("", path.read_text(encoding="utf-8"))
        assert not re.search(r"^\|.*\b0\.\d{4}\b", bare, re.M), path.name


def test_the_picture_has_the_numbers_of_its_rows() -> None:
    assert json.loads((ROOT / "docs" / "gain.json").read_text()) == numbers(lines())
    assert (ROOT / "docs" / "gain.png").stat().st_size < 400_000


def rows(*names: str) -> list[dict[str, Any]]:
    return [row for name in names for row in json.loads((ROWS / name / "results.json").read_text())["rows"] if row["rmse"] is not None]


def by_hand(found: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return least([row for row in found if row["solver"] != "fitted" and row["grid"] != "optimized"])


def test_fitted_samplers_have_the_least_error_from_4_evaluations_on() -> None:
    """docs/fitted.md: from 4 to 10 evaluations, on every model and guidance scale that was measured."""
    problems = (
        ("digits-edm", "digits-edm-few", "digits-edm-optimized", "digits-edm-fitted"),
        ("digits-edm-guidance-2", "digits-edm-guidance-2-two", "digits-edm-guidance-2-fitted"),
        ("digits-ddpm", "digits-ddpm-optimized", "digits-ddpm-fitted"),
        ("cifar10-16/standard",),
        ("cifar10-16/guidance-2",),
    )
    for names in problems:
        found = rows(*names)
        ours, theirs = least([row for row in found if row["solver"] == "fitted"]), by_hand(found)
        shared = [nfe for nfe in ours if nfe >= 4 and nfe in theirs]
        assert shared
        assert all(ours[nfe]["rmse"] < theirs[nfe]["rmse"] for nfe in shared), names


def test_the_sentences_of_the_guides_say_what_the_rows_say() -> None:
    """Figures that stand in running text, each computed from its rows."""
    guides = {
        name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("schedules", "statistics", "dsno", "diffusers", "choose")
    }
    guides = {name: " ".join(text.split()) for name, text in guides.items()}

    def ratios(found: list[dict[str, Any]], solver: str, counts: tuple[int, ...]) -> list[str]:
        own = {row["nfe"]: row["rmse"] for row in found if (row["solver"], row["grid"]) == (solver, "optimized")}
        menu = by_hand([row for row in found if row["solver"] == solver])
        return [f"{own[nfe] / menu[nfe]['rmse']:.2f}" for nfe in counts]

    natural = rows("cifar10-16/standard")
    natural = [row for row in natural if row["library"] == "fewstep"]
    unipc, v3 = (ratios(natural, solver, (5, 6, 8, 10)) for solver in ("unipc-2", "dpm-solver-v3"))
    said = f"{min(unipc)} to {max(unipc)} of the error of the best standard grid for UniPC-2, and {min(v3)} to {max(v3)} for DPM-Solver-v3"
    assert said in guides["schedules"]
    digits = [row for row in rows("digits-edm", "digits-edm-optimized") if row["library"] == "fewstep"]
    first, *_, last = ratios(digits, "unipc-2", (5, 6, 8, 10))
    assert f"{first} to {last} for UniPC-2 at 5 to 10 evaluations" in guides["schedules"]
    tuned = {(row["form"], row["nfe"]): row for row in json.loads((ROWS / "tuned_models" / "results.json").read_text())["rows"]}
    before, after = tuned["phase 1 alone", 3], tuned["mean", 3]
    assert f"from {before['rmse']:.4f} to {after['rmse']:.4f}" in guides["schedules"]
    assert f"from {before['fd']:.2f} to {after['fd']:.2f}" in guides["schedules"]

    every = []
    for name in ("digits-edm", "digits-edm-guidance-2", "digits-ddpm"):
        found = [row for row in rows(name) if row["grid"] != "optimized"]
        ours = least([row for row in found if row["solver"] == "dpm-solver-v3"])
        others = least([row for row in found if row["solver"] != "dpm-solver-v3"])
        every += [ours[nfe]["rmse"] / others[nfe]["rmse"] for nfe in (5, 6, 8, 10)]
    assert f"{min(every):.2f} to {max(every):.2f} of the next" in guides["statistics"]

    student, teacher = least(rows("digits-dsno")), by_hand(rows("digits-edm-few"))
    assert f"{student[1]['rmse'] / teacher[1]['rmse']:.2f} of the error of its teacher's best single step" in guides["dsno"]
    pipeline = {(row["scheduler"], row["steps"]): row["rmse"] for row in json.loads((ROWS / "pipeline_study.json").read_text())["rows"]}
    theirs = min(error for (name, steps), error in pipeline.items() if steps == 5 and name.startswith("diffusers"))
    usual = pipeline["diffusers DPMSolverMultistep, leading", 5]
    said = f"{pipeline['fitted', 5]:.3f} at 5 steps, the best of diffusers' schedulers {theirs:.3f}, "
    said += f"and DPM-Solver++ as that pipeline configures it {usual:.3f}"
    assert said in guides["diffusers"]
    at_8, at_10 = ({row["solver"]: row["rmse"] for row in digits if (row["nfe"], row["grid"]) == (nfe, "angle")} for nfe in (8, 10))
    said = (
        f"`ipndm` has {at_8['ipndm'] / at_8['unipc-2']:.2f} of its error at 8 evaluations and {at_10['ipndm'] / at_10['unipc-2']:.2f} at 10"
    )
    assert said in guides["choose"]


def test_the_guide_to_noise_says_what_its_rows_say() -> None:
    found = [NoiseRow(**row) for row in read_noise_results(ROWS / "noise" / "digits-edm" / "results.json")["rows"]]
    five = {row.solver: row for row in found if row.nfe == 5}
    assert [(one.nfe, one.verdict) for one in contests(found)] == [(5, "not apart"), (10, "not apart")]
    best = contests(found)[0]
    assert best.stochastic is five["er-sde-3"] and best.deterministic is five["unipc-2"]

    def apart(near: str, far: str) -> bool:
        ends = five[near].fd_ci, five[far].fd_ci
        return ends[0] is not None and ends[1] is not None and ends[0][1] < ends[1][0]

    assert apart("er-sde-3", "ddim") and apart("ddim", "ddim:eta=1")
    text = (ROOT / "docs" / "noise.md").read_text(encoding="utf-8")
    assert f"`ddim` goes from {five['ddim'].fd:.2f} to {five['ddim:eta=1'].fd:.2f} with `eta=1`" in text
    assert (
        max(five.values(), key=lambda row: row.precision or 0) is min(five.values(), key=lambda row: row.recall or 0) is five["ddim:eta=1"]
    )
    assert (five["sde-dpm-solver-pp-3m"].labels or 1) < 0.5


def test_the_picture_shows_five_evaluations_doing_the_work_of_eight() -> None:
    made = lines()
    theirs = min((made[label] for label in ("iPNDM", "UniPC-2", "DPM-Solver-v3")), key=lambda line: line[SHOWN]["rmse"])
    assert next(nfe for nfe, row in theirs.items() if row["rmse"] <= made["fitted"][SHOWN]["rmse"]) == 8
