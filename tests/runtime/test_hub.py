"""Pushed and fetched: against a small server of the endpoints that huggingface_hub calls, on this machine."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from tests.runtime.hub_server import TOKEN, Hub

from fewstep import ArtifactError, ModelStatistics, Sampler, VPLinear, make_grid, make_solver
from fewstep.runtime.hub import header

PNG = b"\x89PNG\r\n\x1a\n a picture"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def a_sampler(**card):
    schedule = VPLinear()
    return Sampler.build(make_solver("unipc-3"), make_grid("angle", schedule, 5), schedule, card=card)


def some_statistics(**card):
    lam = torch.linspace(-5, 4, 10, dtype=torch.float64)
    values = torch.linspace(0, 1, 40, dtype=torch.float32).reshape(10, 1, 2, 2)
    return ModelStatistics(lam, values, -values, 2 * values, (3, 2, 2), VPLinear(), "abc", 2.0, card)


def same(one, two):
    if isinstance(one, Sampler):
        tensors = [(getattr(one.tableau, name), getattr(two.tableau, name)) for name in ("record", "update", "bias", "noise")]
        return all(torch.equal(a, b) for a, b in tensors) and one.card == two.card and one.options == two.options
    return one.fingerprint == two.fingerprint and one.card == two.card


ARTIFACTS = {"sampler": a_sampler, "statistics": some_statistics}


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


# -- there and back -------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own, where it puts a large file
@pytest.mark.parametrize("lfs", [False, True])
@pytest.mark.parametrize("kind", ARTIFACTS)
def test_round_trip(kind, lfs, hub):
    artifact, hub.lfs = ARTIFACTS[kind](command="fewstep fit"), lfs
    url = artifact.push_to_hub("me/one", private=True, token=TOKEN)
    assert url.startswith(f"{hub.url}/me/one/commit/")
    assert len(hub.messages) == 1
    assert set(hub.tree("me/one")) == {".gitattributes", "README.md", f"{kind}.json", f"{kind}.safetensors"}
    assert hub.private["me/one"]
    assert bool(hub.large) == lfs
    assert same(type(artifact).from_pretrained("me/one", token=TOKEN), artifact)


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_without_the_network_the_cache_does(kind, hub, tmp_path):
    artifact = ARTIFACTS[kind]()
    artifact.push_to_hub("me/one", token=TOKEN)
    with pytest.raises(ArtifactError, match="it is not in the cache, and the hub was not asked"):
        type(artifact).from_pretrained("me/one", cache_dir=tmp_path / "mine", local_files_only=True)
    type(artifact).from_pretrained("me/one", cache_dir=tmp_path / "mine")
    hub.calls.clear()
    assert same(type(artifact).from_pretrained("me/one", cache_dir=tmp_path / "mine", local_files_only=True), artifact)
    assert hub.calls == []
    constants_url = constants.ENDPOINT
    constants.ENDPOINT = "http://127.0.0.1:9"  # nobody listens there
    try:
        assert same(type(artifact).from_pretrained("me/one", cache_dir=tmp_path / "mine"), artifact)
    finally:
        constants.ENDPOINT = constants_url


def test_several_in_one_repository_and_nothing_else_is_fetched(hub):
    three, five = a_sampler(name="three"), a_sampler(name="five")
    three.push_to_hub("me/set", subfolder="nfe-03", token=TOKEN)
    five.push_to_hub("me/set", subfolder="nfe[5]", token=TOKEN)
    hub.tree("me/set")["weights.bin"] = b"a pickle, for all we know"
    hub.tree("me/set")["nfe-03/more.json"] = b"{}"
    assert same(Sampler.from_pretrained("me/set", subfolder="nfe-03"), three)
    assert same(Sampler.from_pretrained("me/set", subfolder="nfe[5]"), five)
    fetched = {path.rpartition("resolve/")[2].partition("/")[2] for _, path in hub.calls if "/resolve/" in path}
    assert fetched == {
        f"{folder}/{name}" for folder in ("nfe-03", "nfe[5]") for name in ("README.md", "sampler.json", "sampler.safetensors")
    }
    with pytest.raises(ArtifactError, match=r"there is no sampler.json in its top folder: .* pass subfolder="):
        Sampler.from_pretrained("me/set")
    with pytest.raises(ArtifactError, match=r"there is no statistics.json in its folder nfe-03"):
        ModelStatistics.from_pretrained("me/set", subfolder="nfe-03")


def test_revisions(hub):
    old, new = a_sampler(name="old"), a_sampler(name="new")
    old.push_to_hub("me/one", token=TOKEN)
    first = hub.branches["me/one"]["main"]
    for _ in range(2):  # the branch is made once
        new.push_to_hub("me/one", revision="better", token=TOKEN, commit_message="Fit longer")
    assert hub.messages[-1] == "Fit longer"
    assert same(Sampler.from_pretrained("me/one"), old)
    assert same(Sampler.from_pretrained("me/one", revision="better"), new)
    assert same(Sampler.from_pretrained("me/one", revision=first), old)
    with pytest.raises(ArtifactError, match="the repository has no revision 'worse'"):
        Sampler.from_pretrained("me/one", revision="worse")


def test_a_folder_is_read_where_it_is(tmp_path, hub):
    sampler = a_sampler()
    sampler.save(tmp_path / "set" / "nfe-05")
    for asked in ({"repo_id_or_folder": str(tmp_path / "set"), "subfolder": "nfe-05"}, {"repo_id_or_folder": tmp_path / "set" / "nfe-05"}):
        assert same(Sampler.from_pretrained(**asked), sampler)
    with pytest.raises(ArtifactError, match="cannot read"):
        Sampler.from_pretrained(tmp_path / "elsewhere")
    assert hub.calls == []


# -- cards ----------------------------------------------------------------------------------------------------------------------------


def test_the_card_on_the_hub(hub, tmp_path):
    picture = tmp_path / "levels.png"
    picture.write_bytes(PNG)
    sampler = a_sampler(license="apache-2.0", of="someone/their-model", command="fewstep fit: 'x'")
    sampler.push_to_hub("me/set", subfolder="nfe-05", revision="better", pictures=[picture], token=TOKEN)
    assert hub.tree("me/set", "better")["nfe-05/levels.png"] == PNG
    text = hub.tree("me/set", "better")["nfe-05/README.md"].decode()
    assert front_matter(text) == {
        "library_name": "fewstep",
        "tags": ["fewstep", "diffusion", "sampler"],
        "license": "apache-2.0",
        "base_model": "someone/their-model",
    }
    assert "![levels.png](levels.png)" in text
    block = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    names = {}
    exec(block.partition("images =")[0], names)  # the loading half runs as it is written
    assert same(names["sampler"], sampler)


def test_the_card_of_statistics(hub, tmp_path):
    some_statistics(of="digits-edm").push_to_hub("me/ems", token=TOKEN)
    text = hub.tree("me/ems")["README.md"].decode()
    assert front_matter(text) == {"library_name": "fewstep", "tags": ["fewstep", "diffusion", "model-statistics"]}
    assert "statistics.png" not in text
    block = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    names = {}
    exec(block, names)
    assert names["solver"].statistics.fingerprint == some_statistics().fingerprint
    (tmp_path / "statistics.png").write_bytes(PNG)
    some_statistics().push_to_hub("me/ems", pictures=[tmp_path / "statistics.png"], token=TOKEN)
    assert "(statistics.png)" in hub.tree("me/ems")["README.md"].decode()


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ({"of": "digits-edm"}, None),
        ({"of": "./runs/model"}, None),
        ({"of": "/tmp/model"}, None),
        ({"of": "runs/a/b"}, None),
        ({"of": "a/b"}, "a/b"),
        ({"of": "local", "base_model": "a/b.c-d"}, "a/b.c-d"),
    ],
)
def test_only_a_hub_id_is_a_base_model(card, base):
    assert front_matter(header(card)).get("base_model") == base


def test_a_local_card_has_the_header_too(tmp_path):
    for name, make in ARTIFACTS.items():
        text = (make().save(tmp_path / name) / "README.md").read_text()
        assert front_matter(text)["library_name"] == "fewstep"
        assert "load(" in text


# -- what the hub may say -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no such repository, or it is private"),
        (403, "GatedRepo", "its owner asks for an agreement first"),
        (403, "", r"you may not \(the hub says 403\): log in"),
        (401, "RepoNotFound", "there is no such repository, or it is private"),
        (401, "", r"you may not \(the hub says 401\)"),
        (500, "", "the hub (says|did not answer|was not asked)"),
    ],
)
def test_refusals_of_a_download(hub, status, code, message):
    a_sampler().push_to_hub("me/one", token=TOKEN)
    hub.errors["/api/models/me/one"] = (status, code, "no")
    with pytest.raises(ArtifactError, match=f"cannot fetch a sampler from me/one: .*{message}"):
        Sampler.from_pretrained("me/one")


@pytest.mark.parametrize("at", ["/api/repos/create", "/api/models/me/one/commit"])
@pytest.mark.parametrize(
    ("status", "message"),
    [(403, r"you may not \(the hub says 403\): log in .* with a token that may"), (500, "the hub says .*500")],
)
def test_refusals_of_a_push(hub, at, status, message):
    hub.errors[at] = (status, "", "no")
    with pytest.raises(ArtifactError, match=f"cannot push to me/one: {message}"):
        a_sampler().push_to_hub("me/one", token=TOKEN)


def test_without_a_token_nothing_is_pushed(hub):
    with pytest.raises(ArtifactError, match=r"you may not \(the hub says 401\): log in"):
        a_sampler().push_to_hub("me/one", token=False)
    assert hub.commits == {}


def test_nobody_answers(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="cannot push to me/one: .*check the network"):
        a_sampler().push_to_hub("me/one", token=TOKEN)
    with pytest.raises(ArtifactError, match="cannot fetch a sampler from me/one: .*check the network"):
        Sampler.from_pretrained("me/one")


@pytest.mark.parametrize("name", ["no such folder", "a/b/c", "./missing/", "-x/y"])
def test_names_that_are_no_ids(hub, name):
    with pytest.raises(ArtifactError, match="neither a folder here nor the id of a repository"):
        Sampler.from_pretrained(name)


@pytest.mark.parametrize("subfolder", ["../up", "/root", "a/../../b"])
def test_a_subfolder_stays_inside(hub, subfolder):
    for ask in (
        lambda: Sampler.from_pretrained("me/one", subfolder=subfolder),
        lambda: a_sampler().push_to_hub("me/one", subfolder=subfolder),
    ):
        with pytest.raises(ArtifactError, match="a path inside the repository"):
            ask()


def test_only_pictures_go_along(hub, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for path in (tmp_path / "weights.bin", tmp_path / "missing.png"):
        with pytest.raises(ArtifactError, match="is not a picture that can be pushed"):
            a_sampler().push_to_hub("me/one", pictures=[path], token=TOKEN)
    assert hub.calls == []


def test_damage_on_the_way_is_seen(hub):
    a_sampler().push_to_hub("me/one", token=TOKEN)
    tree = hub.tree("me/one")
    tree["sampler.safetensors"] = tree["sampler.safetensors"][:-1] + b"x"
    with pytest.raises(ArtifactError, match="its checksum is not the one"):
        Sampler.from_pretrained("me/one")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (lambda: Sampler.from_pretrained("me/one"), lambda: a_sampler().push_to_hub("me/one")):
        with pytest.raises(ArtifactError, match=r"huggingface_hub is not installed; pip install 'fewstep\[hub\]'"):
            ask()


# -- as a user has it -----------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, fewstep
assert "huggingface_hub" not in sys.modules
schedule = fewstep.VPLinear()
sampler = fewstep.Sampler.build(fewstep.make_solver("ddim"), fewstep.make_grid("angle", schedule, 3), schedule)
sampler.push_to_hub("me/one", token=sys.argv[1])
print(fewstep.Sampler.from_pretrained("me/one").nfe)
print(fewstep.Sampler.from_pretrained("me/one", local_files_only=True).solver)
"""


@pytest.mark.slow
def test_a_program_with_the_endpoint_in_its_environment(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, TOKEN], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["3", "DDIM"]
    assert Path(tmp_path / "home" / "hub" / "models--me--one").is_dir()


def test_the_guide_runs_as_it_is_written(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    page = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "sharing.md", "exec"), names)
    assert names["address"].startswith(f"{hub.url}/you/six-steps/commit/")
    shown = re.search(r"```yaml\n---\n(.*?)---\n", page, re.S).group(1)
    assert hub.tree("you/six-steps")["README.md"].decode().startswith(f"---\n{shown}---\n")
