"""Every Python block of the README and the guides runs as it is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.diffusers.tiny_pipelines import load, make

import fewstep

ROOT = Path(__file__).parents[2]
GUIDES = ("index", "own-network", "comfyui", "statistics", "schedules", "dsno", "report", "manual-stepping", "extending")
PAGES = ("README.md", *(f"docs/{name}.md" for name in GUIDES))


def run_blocks(page: str, names: dict[str, Any]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


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


@pytest.mark.usefixtures("short_reference")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = fewstep.DiscreteVP.scaled_linear()
    denoiser = fewstep.AdaptedDenoiser(lambda x, time: 0.1 * x, schedule, "epsilon")
    sampler = fewstep.Sampler.build(fewstep.make_solver("unipc-2"), fewstep.make_grid("angle", schedule, 3), schedule)

    class Unet(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor) -> object:
            return type("Output", (), {"sample": 0.1 * x})

    names = {
        "torch": torch,
        "fewstep": fewstep,
        "my_network": lambda x, time: 0.1 * x,
        "my_unet": lambda x, time: 0.1 * x,
        "unet": Unet(),
        "schedule": schedule,
        "denoiser": denoiser,
        "sampler": sampler,
        "x_T": torch.randn(4, 4, 8, 8),
        "empty_prompt_embedding": torch.zeros(7, 5),
        "prompt_embeddings": torch.randn(4, 7, 5),
    }
    if page == "README.md":
        make("sd", tmp_path)
        names["pipe"] = load(tmp_path / "sd")
        fewstep.Sampler.build(fewstep.make_solver("unipc-2"), fewstep.make_grid("angle", schedule, 5), schedule).save("fitted")
    run_blocks(page, names)
    if page == "docs/extending.md":
        assert fewstep.tabulate(names["TwoStep"](), sampler.tableau.nodes).memory == 2
