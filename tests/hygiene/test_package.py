"""Wheel and sdist: small, whole, and enough to run the demo where nothing of the repository is. Before a release; `make test-package`."""

import email
import os
import re
import subprocess
import sys
import tarfile
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
WHEEL_LIMIT, SDIST_LIMIT = 13e6, 14e6  # bytes
NEEDED = (  # what is no module, one of each kind
    "py.typed",
    "apps/page/look.css",
    "apps/page/paint.js",
    "evaluate/report/report.html.j2",
    "evaluate/metrics/weights/digits-features/features.safetensors",
    "models/weights/digits-edm/fitted/nfe-05/sampler.safetensors",
    "models/weights/digits-edm/unet/diffusion_pytorch_model.safetensors",
)
IN_SDIST = {"src", "PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", ".gitignore"}

pytestmark = pytest.mark.release


def run(*words: object, cwd: Path) -> str:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {**{key: value for key, value in os.environ.items() if key not in hidden}, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel, built from the sdist, and the sdist."""
    folder = ROOT / name if (name := os.environ.get("FEWSTEP_DIST")) else tmp_path_factory.mktemp("dist")
    for old in folder.glob("fewstep-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    (found,) = dist.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def about(wheel: Path) -> Message:
    """The metadata of the wheel."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_is_small_and_whole(wheel: Path) -> None:
    assert wheel.stat().st_size < WHEEL_LIMIT
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"fewstep/{name}" for name in NEEDED} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fewstep"}
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "fewstep").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules and not any(name.endswith(".pyc") for name in names)


def test_the_sdist_holds_the_package_and_nothing_of_the_repository_else(sdist: Path) -> None:
    assert sdist.stat().st_size < SDIST_LIMIT
    with tarfile.open(sdist) as archive:
        assert {name.split("/")[1] for name in archive.getnames() if "/" in name} == IN_SDIST


def test_its_page_on_an_index_needs_no_file_beside_it(about: Message) -> None:
    page = str(about.get_payload())
    assert about["Description-Content-Type"] == "text/markdown" and page.startswith("# fewstep")
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    assert "![" in page and re.search(r"!\[[^\]]*\]\(https://raw\.githubusercontent\.com/fewstep/fewstep/main/docs/gain\.png\)", page)


def test_it_is_the_version_that_is_released(about: Message) -> None:
    asked = os.environ.get("FEWSTEP_RELEASE")
    if not asked:
        pytest.skip("no release was named: make test-package RELEASE=v1.2.3")
    assert asked == f"v{about['Version']}"
    first = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    assert re.fullmatch(rf"\[{re.escape(about['Version'])}\] - \d{{4}}-\d\d-\d\d", first), f"date the changelog: {first}"


def test_both_run_where_nothing_else_is(wheel: Path, sdist: Path, about: Message, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    bin_ = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = (bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    held = ("--constraint", ROOT / os.environ.get("FEWSTEP_CONSTRAINTS", "constraints.txt"))
    run(*pip, *held, wheel, cwd=tmp_path)
    assert run(bin_ / "fewstep", "--version", cwd=tmp_path) == f"fewstep {about['Version']}\n"
    run(*pip, *held, f"{wheel}[all]", cwd=tmp_path)  # as the README has it
    said = run(bin_ / "fewstep", "demo", "-n", 8, "--out", "demo", cwd=tmp_path)
    assert "unipc-2" in said and "fitted" in said and (tmp_path / "demo" / "pictures.png").is_file()
    run(*pip, "--force-reinstall", "--no-deps", sdist, cwd=tmp_path)
    assert "pictures: " in run(bin_ / "fewstep", "sample", "digits-edm", "--nfe", 5, "-n", 8, "--out", "samples", cwd=tmp_path)
