"""What importing the package costs, and what it offers."""

import subprocess
import sys

import fewstep

OPTIONAL = ("accelerate", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "scipy", "sklearn", "torchmetrics", "transformers")
LOADED = "import sys, fewstep, fewstep.solvers; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def test_importing_loads_no_optional_library():
    run = subprocess.run([sys.executable, "-W", "error", "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "torch" in loaded
    assert set(loaded).isdisjoint(OPTIONAL)
    assert run.stderr == ""


def test_public_names_are_sorted_unique_and_there():
    assert fewstep.__all__ == sorted(set(fewstep.__all__))
    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None


def test_every_public_object_says_what_it_is():
    undocumented = [name for name in fewstep.__all__ if not name.startswith("_") and not getattr(fewstep, name).__doc__]
    assert undocumented == []
