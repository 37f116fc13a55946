"""Checkpoints of every format, made here in exactly that format, against the formulas of their papers; and files that mean harm."""

import io
import math
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep import DiscreteVP, Model, ModelError, Sampler, load_model, make_grid, make_solver, sample, start_noise
from fewstep.models.formats.checkpoints import load_checkpoint
from fewstep.models.networks.unets import DhariwalUNet, SongUNet

FLOAT32 = 2e-5  # of values of order 1, through a whole network

SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
SONG |= {"attn_resolutions": [4], "augment_dim": 9}


# ---- EDM's pickles


class Persistent(nn.Module):
    """As EDM's decorator makes a class: it pickles its source and its state instead of its name."""

    def __init__(self, name: str, source: str = "raise SystemExit('this ran')", **init: object) -> None:
        super().__init__()
        self._name, self._source, self._init_args, self._init_kwargs = name, source, (), init

    def __reduce__(self) -> tuple:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_name", "_source")}
        meta = {"type": "class", "version": 6, "module_src": self._source, "class_name": self._name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def persistent(module: nn.Module, name: str, **init: object) -> Persistent:
    """A network as a tree of persistent objects; EDM's containers are torch's own."""
    made = Persistent(name, **init)
    made.skip_scale = np.sqrt(0.5)  # numpy's numbers are among EDM's attributes
    for key, value in module._parameters.items():
        made.register_parameter(key, value)
    for key, value in module._buffers.items():
        made.register_buffer(key, value)
    for key, child in module._modules.items():
        if isinstance(child, nn.ModuleDict):
            made.add_module(key, nn.ModuleDict({k: persistent(v, "UNetBlock", init={"gain": np.sqrt(0.2)}) for k, v in child.items()}))
        else:
            made.add_module(key, None if child is None else persistent(child, "Linear"))
    return made


def edm_pickle(path: Path, precond: str, network: nn.Module, kind: str, options: dict, **law: object) -> Path:
    """A snapshot as EDM's training writes it."""
    outer = Persistent(precond, model_type=kind, use_fp16=True, **law)
    for key, value in {**law, "use_fp16": True, "img_resolution": 8}.items():
        outer.register_buffer(key, value) if isinstance(value, Tensor) else setattr(outer, key, value)
    outer.add_module("model", persistent(network, kind, **options, dropout=np.float64(0.13), label_dropout=0))
    path.write_bytes(pickle.dumps({"ema": outer, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {"path": "cifar.zip"}}))
    return path


def song(options: dict | None = None, seed: int = 0) -> SongUNet:
    torch.manual_seed(seed)
    return SongUNet(**{**SONG, **(options or {})}).eval().requires_grad_(False)


def sampled(model: Model) -> Tensor:
    """Three steps."""
    schedule, solver = model.schedule, make_solver("ddim")
    sampler = Sampler.build(solver, make_grid("angle", schedule, 3), schedule)
    with torch.no_grad():
        x0 = sample(model, sampler, start_noise(sampler.tableau.nodes, [1, 2], model.shape), model.labels([1, 2]))
    assert bool(torch.isfinite(x0).all()) and x0.shape == (2, *model.shape)
    return x0


def at(sigma: float, vp: bool) -> tuple[Tensor, float]:
    """A state of EDM's, ``x0 + sigma noise``, and what to multiply it with where ``alpha^2 + sigma^2 = 1``."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * math.hypot(0.5, sigma)
    return x, 1 / math.sqrt(1 + sigma**2) if vp else 1.0


# EDM's table 1: c_skip, c_out, c_in, c_noise by sigma; whether ours is variance preserving, and its time
def vp_time(sigma: float) -> float:
    return (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9


TABLE_1 = {
    "EDMPrecond": (
        lambda s: (0.25 / (s**2 + 0.25), s * 0.5 / math.sqrt(s**2 + 0.25), 1 / math.sqrt(s**2 + 0.25), math.log(s) / 4),
        {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": math.inf},
        (False, lambda s: s),
    ),
    "VPPrecond": (
        lambda s: (1, -s, 1 / math.sqrt(1 + s**2), 999 * vp_time(s)),
        {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 0.001, "sigma_max": 152.0},
        (True, vp_time),
    ),
    "VEPrecond": (lambda s: (1, s, 1, math.log(s / 2)), {"sigma_min": 0.02, "sigma_max": 100}, (False, lambda s: s)),
}


@pytest.mark.usefixtures("edm_modules")
@pytest.mark.parametrize("precond", TABLE_1)
@pytest.mark.parametrize("label_dim", [0, 4])
@pytest.mark.every(3)
def test_edm_pickles_against_table_1(tmp_path: Path, precond: str, label_dim: int) -> None:
    formulas, law, (vp, time) = TABLE_1[precond]
    options = {**SONG, "label_dim": label_dim}
    network = song(options)
    path = edm_pickle(tmp_path / "network.pkl", precond, network, "SongUNet", options, **law)
    model = load_model(path, trust=True)
    assert (model.shape, model.classes, model.null_label) == ((3, 8, 8), label_dim or None, label_dim or None)
    labels = torch.tensor([3, 0]) if label_dim else None
    for sigma in (0.05, 0.7, 20.0):
        skip, out, c_in, noise = formulas(sigma)
        x, scale = at(sigma, vp)
        f = network(c_in * x, torch.full((2,), noise), labels)
        x0 = model(scale * x, torch.tensor(time(sigma), dtype=torch.float64), labels)
        torch.testing.assert_close(x0, skip * x + out * f, rtol=FLOAT32, atol=FLOAT32 * (1 + sigma))
    sampled(model)
    if label_dim:
        assert model.guided(2.0)(x, torch.tensor(1.0, dtype=torch.float64), labels).shape == x.shape
    if precond == "EDMPrecond":
        assert (model.schedule.t_min, model.schedule.t_max) == (0.002, 80.0)


@pytest.mark.usefixtures("edm_modules")
def test_an_improved_ddpm_pickle_at_the_levels_of_its_table(tmp_path: Path) -> None:
    m, options = 20, {"img_resolution": 8, "in_channels": 3, "out_channels": 6, "model_channels": 64, "channel_mult": [1], "num_blocks": 1}
    options |= {"attn_resolutions": [8]}
    torch.manual_seed(0)
    network = DhariwalUNet(**options).eval().requires_grad_(False)
    u, bar = torch.zeros(m + 1), [math.sin(math.pi / 2 * j / m / 1.008) ** 2 for j in range(m + 1)]
    for j in range(m, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1).sqrt()
    model = load_checkpoint(edm_pickle(tmp_path / "i.pkl", "iDDPMPrecond", network, "DhariwalUNet", options, M=m, u=u), trust=True)
    assert isinstance(model.schedule, DiscreteVP) and model.schedule.t_max == m - 1
    for j in (0, 7, m - 1):
        sigma = float(u[j])
        x, scale = at(sigma, True)
        f = network(x * scale, torch.full((2,), float(m - 1 - j)))[:, :3]
        x0 = model(scale * x, torch.tensor(m - 1 - j, dtype=torch.float64))
        torch.testing.assert_close(x0, x - sigma * f, rtol=FLOAT32, atol=FLOAT32 * (1 + sigma))
    sampled(model)


@pytest.mark.usefixtures("edm_modules")
def test_an_edm_pickle_needs_trust_and_its_program_never_runs(tmp_path: Path) -> None:
    path = edm_pickle(tmp_path / "network.pkl", "EDMPrecond", song(), "SongUNet", SONG, sigma_data=0.5)
    with pytest.raises(ModelError, match="could run any program.*say that you trust where it comes from with trust=True"):
        load_model(path)
    before = set(sys.modules)
    load_checkpoint(path, trust=True)  # its source would exit, and the function that runs it would fail
    assert set(sys.modules) == before


class Payload:
    """What pickles as a call of a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def _refused(path: Path, sentinel: Path, names: str, **options: object) -> None:
    with pytest.raises(ModelError, match=names):
        load_checkpoint(path, **options)
    assert not sentinel.exists()


@pytest.mark.usefixtures("edm_modules")
@pytest.mark.parametrize("place", ["alone", "ema", "state", "parameter", "loss_fn", "key"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.every(3, 2)
def test_a_pickle_that_means_harm_is_refused_and_not_run(tmp_path: Path, place: str, protocol: int) -> None:
    sentinel = tmp_path / "sentinel"
    payload = Payload(os.system, f"touch {sentinel}")
    outer = Persistent("EDMPrecond")
    outer.add_module("model", Persistent("SongUNet"))
    data = {"ema": outer}
    if place == "state":
        outer.note = payload
    elif place == "parameter":
        outer.__dict__["_parameters"]["weight"] = payload
    elif place == "key":
        data = {"ema": outer, ("x", payload): 1}
    else:
        data = payload if place == "alone" else {**data, place: payload}
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    _refused(
        path, sentinel, r"the file names (posix|nt|copyreg|copy_reg)\.\w+, which no EDM network needs.*nothing of it has run", trust=True
    )
    if place == "alone":  # proof that it would have run
        pickle.loads(path.read_bytes())
        assert sentinel.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(V__import__('os').system('touch SENTINEL')\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"c__builtin__\nexec\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x0a__import__\x93.",
        b"ctorch.storage\n_load_from_bytes.__globals__\n.",
        b"ctorch.serialization\nload\n.",
        b"ctorch\nload\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n.",
        b"(S'touch SENTINEL'\nios\nsystem\n.",
        b"\x80\x02cos\nsystem\n\x81.",
        b"cfewstep.models.formats.checkpoints\nload_checkpoint\n.",
    ],
)
def test_other_ways_to_name_a_function(tmp_path: Path, payload: bytes) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / "evil.pkl"
    path.write_bytes(payload.replace(b"SENTINEL", str(sentinel).encode()))
    _refused(path, sentinel, "which no EDM network needs: it was refused, and nothing of it has run", trust=True)


@pytest.mark.usefixtures("edm_modules")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_in_the_numbers_of_a_tensor(tmp_path: Path, zipped: bool) -> None:
    """Torch's plain unpickling would read these bytes with an unpickler that runs anything."""
    sentinel, stream = tmp_path / "sentinel", io.BytesIO()
    torch.save(Payload(os.system, f"touch {sentinel}"), stream, _use_new_zipfile_serialization=zipped)
    storage = Payload(torch.storage._load_from_bytes, stream.getvalue())
    tensor = Payload(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, OrderedDict())
    outer = Persistent("EDMPrecond")
    outer.add_module("model", Persistent("SongUNet"))
    outer.__dict__["_buffers"]["u"] = tensor
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"ema": outer}))
    _refused(path, sentinel, "evil.pkl is damaged, or not what it is taken for", trust=True)


def test_records_cannot_be_used_to_reach_anything() -> None:
    """A pickle may set attributes of what it names: of records made for this file alone, so the next file finds them as they were."""
    from fewstep.models.formats import edm_pickles as checkpoints

    spoil = b"ctorch.storage\n_load_from_bytes\n(N(dVkind\nVevil\nV__new__\nNdtb."
    with pytest.raises((TypeError, AttributeError, pickle.UnpicklingError)):
        spoiled = checkpoints._Unpickler(io.BytesIO(spoil)).load()
        assert spoiled is not checkpoints._Unpickler(io.BytesIO(b"ctorch.storage\n_load_from_bytes\n.")).load()
        spoiled()
    fresh = checkpoints._Unpickler(io.BytesIO(b"ctorch.storage\n_load_from_bytes\n.")).load()
    assert fresh.kind == "_load_from_bytes" and fresh(1).args == (1,) and not hasattr(checkpoints._Record, "kind")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
def test_a_payload_in_a_torch_file(tmp_path: Path, suffix: str) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / f"evil{suffix}"
    torch.save({"model": {"module.all_modules.0.weight": Payload(os.system, f"touch {sentinel}")}}, path)
    _refused(path, sentinel, "holds more than weights.*nothing of it has run")
    _refused(path, sentinel, "holds more than weights.*nothing of it has run", trust=True, format="score-sde", config={})


@pytest.mark.usefixtures("edm_modules")
def test_damaged_pickles(tmp_path: Path) -> None:
    path = edm_pickle(tmp_path / "network.pkl", "EDMPrecond", song(), "SongUNet", SONG, sigma_data=0.5)
    whole = path.read_bytes()

    def says(content: bytes, words: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            load_checkpoint(path, trust=True)

    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        says(whole[:length], "network.pkl is damaged, or not what it is taken for.*fetch it again")
    says(b"PK\x03\x04 a zip", "damaged")
    says(pickle.dumps([1]), "is a pickle without 'ema'")
    says(pickle.dumps({"ema": 1}), "no network in EDM's form at 'ema'")
    for change in ({"version": 5}, {"type": "function"}):
        outer = Persistent("EDMPrecond")
        function, (meta,) = outer.__reduce__()
        says(pickle.dumps({"ema": Payload(function, {**meta, **change})}), "only a class of 6 is known")
    edm_pickle(path, "EDMPrecondition", song(), "SongUNet", SONG)
    says(path.read_bytes(), "unknown preconditioning 'EDMPrecondition': did you mean EDMPrecond")
    edm_pickle(path, "EDMPrecond", song(), "SongUNet", {**SONG, "num_blocks": 2})
    says(path.read_bytes(), "network.pkl: the weights do not fit a SongUNet with these options: the file lacks enc.8x8_block1")
    edm_pickle(path, "EDMPrecond", song(), "SongUNet", {**SONG, "wings": 2})
    says(path.read_bytes(), "no option wings")
    edm_pickle(path, "EDMPrecond", song(), "VGG", SONG)
    says(path.read_bytes(), "unknown network class 'VGG'")
    path.write_bytes(whole)
    with pytest.raises(ModelError, match="all its options in itself: leave config out"):
        load_checkpoint(path, trust=True, config={"sigma_data": 1.0})


def test_edm_weights_without_a_pickle(tmp_path: Path) -> None:
    """Somebody's safetensors of the state dict; the options are those EDM's classes were made with."""
    network = song()
    save_file({f"model.{key}": value for key, value in network.state_dict().items()}, tmp_path / "edm.safetensors")
    config = {"precond": "EDMPrecond", "model_type": "SongUNet", "sigma_data": 0.5, **SONG, "dropout": 0.1}
    model = load_checkpoint(tmp_path / "edm.safetensors", format="edm", config=config)
    x = torch.randn(2, 3, 8, 8)
    expected = 0.2 * x + 0.5 / math.sqrt(1.25) * network(x / math.sqrt(1.25), torch.zeros(2))
    torch.testing.assert_close(model(x, torch.tensor(1.0, dtype=torch.float64)), expected, rtol=FLOAT32, atol=FLOAT32)
    with pytest.raises(ModelError, match="config of an EDM network lacks model_type, img_resolution, in_channels"):
        load_checkpoint(tmp_path / "edm.safetensors", format="edm", config={"precond": "EDMPrecond"})
    with pytest.raises(ModelError, match="does not show which format it has: pass format=, one of edm, guided-diffusion, safe"):
        load_checkpoint(tmp_path / "edm.safetensors")
