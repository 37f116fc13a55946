"""Checkpoints of every format, made here in exactly that format, against the formulas of their papers; and files that mean harm."""

import io
import json
import math
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.models.test_unets import ADM, NCSNpp, state_of
from torch import Tensor, nn

from fewstep import ArtifactError, DiscreteVP, Model, ModelError, Sampler, load_model, make_grid, make_solver, sample, start_noise
from fewstep.models.checkpoints import FORMATS, convert, load_checkpoint, save_single_file
from fewstep.models.unets import DhariwalUNet, SongUNet

FLOAT32 = 2e-5  # of values of order 1, through a whole network

SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
SONG |= {"attn_resolutions": [4], "augment_dim": 9}


# ---- EDM's pickles


def _reconstruct_persistent_obj(meta: dict) -> object:
    raise AssertionError("EDM's own code must never run")


@pytest.fixture
def edm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """EDM's module of persistent objects, for the time of writing one."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    function = types.FunctionType(_reconstruct_persistent_obj.__code__, globals(), "_reconstruct_persistent_obj")
    function.__module__, function.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = package.persistence = function
    for name, value in (("torch_utils", package), ("torch_utils.persistence", module)):
        monkeypatch.setitem(sys.modules, name, value)


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
    schedule, solver = model.denoiser.schedule, make_solver("ddim")
    sampler = Sampler.build(solver, make_grid("angle", schedule, 3), schedule)
    with torch.no_grad():
        x0 = sample(model.denoiser, sampler, start_noise(sampler.tableau.nodes, [1, 2], model.shape), model.labels([1, 2]))
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
        x0 = model.denoiser(scale * x, torch.tensor(time(sigma), dtype=torch.float64), labels)
        torch.testing.assert_close(x0, skip * x + out * f, rtol=FLOAT32, atol=FLOAT32 * (1 + sigma))
    sampled(model)
    if label_dim:
        assert model.guided(2.0)(x, torch.tensor(1.0, dtype=torch.float64), labels).shape == x.shape
    if precond == "EDMPrecond":
        assert (model.denoiser.schedule.t_min, model.denoiser.schedule.t_max) == (0.002, 80.0)


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
    assert isinstance(model.denoiser.schedule, DiscreteVP) and model.denoiser.schedule.t_max == m - 1
    for j in (0, 7, m - 1):
        sigma = float(u[j])
        x, scale = at(sigma, True)
        f = network(x * scale, torch.full((2,), float(m - 1 - j)))[:, :3]
        x0 = model.denoiser(scale * x, torch.tensor(m - 1 - j, dtype=torch.float64))
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
        b"cfewstep.models.checkpoints\nload_checkpoint\n.",
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
    from fewstep.models import edm_pickles as checkpoints

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
    torch.testing.assert_close(model.denoiser(x, torch.tensor(1.0, dtype=torch.float64)), expected, rtol=FLOAT32, atol=FLOAT32)
    with pytest.raises(ModelError, match="config of an EDM network lacks model_type, img_resolution, in_channels"):
        load_checkpoint(tmp_path / "edm.safetensors", format="edm", config={"precond": "EDMPrecond"})
    with pytest.raises(ModelError, match="does not show which format it has: pass format=, one of edm, guided-diffusion, safe"):
        load_checkpoint(tmp_path / "edm.safetensors")


# ---- ScoreSDE


def score_sde_file(path: Path, network: NCSNpp, sigmas: Tensor | None = None) -> Path:
    """A training checkpoint; its own weights differ from the averaged ones, which the network keeps."""
    torch.manual_seed(0)
    averaged = state_of(network)
    model = OrderedDict({} if sigmas is None else {"module.sigmas": sigmas})
    model.update({f"module.{key}": value if key.endswith(".0.W") and "NIN_" not in key else value + 1 for key, value in averaged.items()})
    shadow = [value for key, value in averaged.items() if key != "all_modules.0.W"]
    ema = {"decay": 0.9999, "num_updates": 3, "shadow_params": shadow}
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()
    torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 3}, path)
    return path


VP, VE = {"image_size": 8, "sde": "vp", "continuous": True}, {"image_size": 8, "sde": "ve"}
SCORE_SDE = {
    "ddpm++": ({"taps": [1, 1]}, {**VP, "fir": False}),
    "ddpm++, deeper": ({"taps": [1, 1], "n": 2, "ch_mult": (1, 2, 2), "attn": (8, 2)}, {**VP, "fir": False}),
    "ddpm++, discrete": ({"taps": [1, 1]}, {**VP, "fir": False, "continuous": False, "num_scales": 100, "beta_max": 2.0}),
    "ncsn++, vp": ({"inputs": "residual"}, {**VP, "fir": True}),
    "ncsn++": ({"inputs": "residual", "embedding": "fourier", "ch_mult": (1, 2, 2)}, VE),
    "ncsn++, centered": ({"inputs": "residual", "embedding": "fourier"}, {**VE, "centered": True}),
    "ncsn++, fourier vp": ({"embedding": "fourier"}, {"image_size": 8, "sde": "vp", "fir": True}),
    "ncsn++ of faces": (
        {"inputs": "input_skip", "output": "output_skip", "embedding": "fourier", "ch_mult": (1, 2, 2)},
        {**VE, "fir": True},
    ),
    "one level": ({"ch_mult": (1,), "n": 2, "attn": (), "taps": [1, 1]}, {**VP, "fir": False}),
    "no pictures in": ({"output": "output_skip"}, {**VP, "fir": True}),
}


@pytest.mark.parametrize("name", SCORE_SDE)
def test_score_sde_against_its_own_network(tmp_path: Path, name: str) -> None:
    options, config = SCORE_SDE[name]
    network = NCSNpp(**options)
    ve = config["sde"] == "ve"
    sigmas = torch.exp(torch.linspace(math.log(50), math.log(0.01), 10, dtype=torch.float64)) if ve else None
    model = load_checkpoint(score_sde_file(tmp_path / "checkpoint_8.pth", network, sigmas), config=config)
    schedule, y = model.denoiser.schedule, torch.randn(2, 3, 8, 8)
    for share in (0.01, 0.3, 1.0):
        t = torch.tensor(round(share * schedule.t_max) if isinstance(schedule, DiscreteVP) else share * schedule.t_max, dtype=torch.float64)
        x0, alpha, sigma = model.denoiser(y, t), float(schedule.alpha(t)), float(schedule.sigma(t))
        if ve:  # their picture is (y+1)/2, their network moves it back; its output is divided by their sigma: x0 = x + sigma^2 score
            gain = 1 if config.get("centered") else 2
            theirs = torch.full((2,), sigma / gain)
            x, score = (y + gain - 1) / gain, network(y, theirs) / theirs[:, None, None, None]
            expected = gain * (x + theirs[:, None, None, None] ** 2 * score) - (gain - 1)
        else:  # score = -network/sigma at 999 t, or at the index of a table
            time = float(t) if isinstance(schedule, DiscreteVP) else 999 * float(t)
            score = -network(y, torch.full((2,), time)) / sigma
            expected = (y + sigma**2 * score) / alpha
        torch.testing.assert_close(x0, expected, rtol=FLOAT32, atol=FLOAT32 * (1 + sigma / alpha))
    if ve:
        assert schedule.t_max == pytest.approx(50 * gain) and schedule.t_min == pytest.approx(0.01 * gain)
    elif isinstance(schedule, DiscreteVP):
        betas = torch.linspace(0.1 / 100, 2.0 / 100, 100, dtype=torch.float64)
        torch.testing.assert_close(schedule.alpha(schedule.times[1:]) ** 2, torch.cumprod(1 - betas, 0))
    else:
        assert (schedule.beta_min, schedule.beta_max) == (0.1, 20.0)
    sampled(model)


def test_score_sde_weights_of_the_model_itself(tmp_path: Path) -> None:
    network = NCSNpp(taps=[1, 1])
    path = score_sde_file(tmp_path / "a.pth", network)
    averaged, own = (load_checkpoint(path, config={**VP, "fir": False, "weights": which}) for which in ("ema", "model"))
    key = "map_layer0.bias"
    torch.testing.assert_close(own.denoiser.network.state_dict()[key], averaged.denoiser.network.state_dict()[key] + 1)
    flat = {f"module.{key}": value.contiguous() for key, value in network.store.items()}  # resaved by somebody
    save_file(flat, tmp_path / "b.safetensors")
    again = load_checkpoint(tmp_path / "b.safetensors", format="score-sde", config={**VP, "fir": False})
    assert again.fingerprint == averaged.fingerprint == load_checkpoint(tmp_path / "b.safetensors", config={**VP, "fir": False}).fingerprint


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "the weights do not show image_size, sde: pass it in config"),
        ({"image_size": 8, "sde": "vp"}, "the weights do not show fir"),
        ({"image_size": 8, "sde": "vp", "fir": False}, "the weights do not show continuous"),
        ({**VP, "fir": False, "imgsize": 8}, "no option 'imgsize' here: did you mean image_size"),
        ({**VP, "fir": False, "nf": 16}, "config says nf = 16, but the weights show 8"),
        ({**VP, "fir": False, "ch_mult": [1, 4]}, r"ch_mult = \[1, 4\], but the weights show \[1, 2\]"),
        ({**VP, "fir": False, "skip_rescale": False}, "skip_rescale = False, which is not known here, only True"),
        ({**VP, "fir": False, "resblock_type": "ddpm"}, "resblock_type = 'ddpm', which is not known here, only 'biggan'"),
        ({**VP, "fir": False, "sde": "subvp"}, "sde 'subvp' has a noise law of its own"),
        ({**VP, "fir": False, "sde": "vpp"}, "unknown sde 'vpp': did you mean vp"),
        ({**VP, "fir": False, "centered": False}, "sde 'vp' with scale_by_sigma = False and centered = False is not known"),
        ({**VP, "fir": False, "scale_by_sigma": True}, "with scale_by_sigma = True"),
        ({**VE, "fir": False}, "the weights do not show sigma_min, sigma_max"),
        ({**VE, "fir": False, "sigma_min": 0.01, "sigma_max": 50.0}, "known with the continuous noise levels of a fourier embedding only"),
        ({**VP, "fir": True, "fir_kernel": [1, 3, 3, 4]}, "is not the same from both sides"),
        ({**VP, "fir": False, "weights": "mean"}, "unknown kind of weights 'mean'"),
        ({**VP, "fir": False, "image_size": 9, "ch_mult": [1, 2]}, None),
    ],
)
def test_score_sde_options_that_lack_or_contradict(tmp_path: Path, config: dict, says: str | None) -> None:
    path = score_sde_file(tmp_path / "a.pth", NCSNpp(taps=[1, 1]))
    if says is None:
        assert load_checkpoint(path, config=config).shape == (3, 9, 9)
        return
    with pytest.raises(ModelError, match=says) as error:
        load_checkpoint(path, config=config)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- guided-diffusion


ADM_CONFIG = {"image_size": 8, "num_heads": 2, "use_new_attention_order": False, "noise_schedule": "linear"}
GUIDED = {
    "legacy order": ({}, {}),
    "new order": ({"new_order": True}, {"use_new_attention_order": True}),
    "by width": ({"ch_mult": (1, 1), "heads": 4}, {"num_heads": None, "num_head_channels": 8}),
    "cosine, deeper": ({"n": 2, "ch_mult": (1, 2, 3), "attn": (8, 4, 2)}, {"noise_schedule": "cosine"}),
    "no classes, no variances": ({"classes": None, "out": 3, "attn": ()}, {}),
    "4000 steps": ({"out": 3}, {"diffusion_steps": 4000, "rescale_timesteps": True}),
    "half width": ({"nf": 64, "ch_mult": (0.5, 1)}, {"predict_xstart": True}),
    "one level": ({"ch_mult": (1,), "n": 2, "attn": ()}, {}),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion_against_its_own_network(tmp_path: Path, name: str) -> None:
    options, config = GUIDED[name]
    config = {key: value for key, value in {**ADM_CONFIG, **config}.items() if value is not None}
    torch.manual_seed(0)
    network = ADM(**options)
    cond = () if network.c["classes"] is None else (torch.tensor([3]),)
    path = tmp_path / "model.pt"
    torch.save(state_of(network, *cond), path)
    model = load_checkpoint(path, config=config)
    assert model.classes == network.c["classes"] and model.null_label is None
    steps, schedule = config.get("diffusion_steps", 1000), model.denoiser.schedule
    if config["noise_schedule"] == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    else:
        bar = [math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(bar, bar[1:], strict=False)], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(schedule.times[1:]) ** 2, torch.cumprod(1 - betas, 0), rtol=1e-9, atol=1e-14)
    labels = torch.tensor([4, 0]) if cond else None
    for t in (0, 300, steps - 5):
        x, alpha_bar = torch.randn(2, 3, 8, 8), float(torch.cumprod(1 - betas, 0)[t])
        time = torch.full((2,), t * (1000 / steps if "rescale_timesteps" in config else 1.0))
        output = network(x, time, *(() if labels is None else (labels,)))[:, :3]
        expected = output if "predict_xstart" in config else (x - math.sqrt(1 - alpha_bar) * output) / math.sqrt(alpha_bar)
        x0 = model.denoiser(x, torch.tensor(t, dtype=torch.float64), labels)
        torch.testing.assert_close(x0, expected, rtol=FLOAT32, atol=FLOAT32 / math.sqrt(alpha_bar))
    sampled(model)
    if cond:
        with pytest.raises(ModelError, match="a class for every image"):
            model.denoiser(x, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        ({"image_size": None}, {}, "do not show image_size"),
        ({"noise_schedule": None}, {}, "do not show noise_schedule"),
        ({"use_new_attention_order": None}, {}, "do not show use_new_attention_order"),
        ({"num_heads": None}, {}, "either num_heads or num_head_channels"),
        ({"num_head_channels": 16}, {}, "either num_heads or num_head_channels"),
        ({"num_heads": 5}, {}, "attention over 64 channels cannot have the heads"),
        ({"noise_schedule": "linea"}, {}, "unknown noise_schedule 'linea': did you mean linear"),
        ({"learn_sigma": False}, {}, "learn_sigma = False, but the weights show True"),
        ({"use_scale_shift_norm": False}, {}, "use_scale_shift_norm = False, which is not known here, only True"),
        ({"resblock_updown": False}, {}, "resblock_updown = False, which is not known"),
        ({}, {"input_blocks.2.0.op.weight": torch.ones(2)}, "resblock_updown = False"),
        ({}, {"out.2.weight": torch.ones(7, 32, 3, 3)}, "a network from 3 to 7 channels is no image model"),
        ({}, {"out.9.weight": torch.ones(7)}, "the weights have out.9.weight, which no guided-diffusion U-Net has"),
        ({}, {"out.2.bias": torch.ones(7, 1)}, "out_conv.bias of shape"),
        ({}, {"out.2.weight": None}, "no guided-diffusion U-Net \\(a classifier"),
        ({}, {"middle_block.0.in_layers.0.bias": None}, "it lacks|lacks dec.4x4_in0.norm0.bias"),
    ],
)
def test_guided_diffusion_options_that_lack_or_contradict(tmp_path: Path, config: dict, change: dict, says: str) -> None:
    state = {**state_of(ADM(), torch.tensor([0])), **change}
    path = tmp_path / "model.pt"
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(ModelError, match=says) as error:
        load_checkpoint(path, config={key: value for key, value in {**ADM_CONFIG, **config}.items() if value is not None})
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- ours, and between them


@pytest.fixture
def checkpoints(tmp_path: Path, edm_modules: None) -> dict[str, tuple[Path, dict]]:
    """One file of each format and how to load it."""
    torch.manual_seed(0)
    torch.save(state_of(ADM(), torch.tensor([0])), tmp_path / "adm.pt")
    ncsn = NCSNpp(inputs="residual", embedding="fourier")
    sigmas = torch.tensor([50.0, 0.01], dtype=torch.float64)
    options = {**SONG, "label_dim": 4}
    return {
        "edm": (edm_pickle(tmp_path / "edm.pkl", "EDMPrecond", song(options), "SongUNet", options, sigma_data=0.6), {"trust": True}),
        "vp": (edm_pickle(tmp_path / "vp.pkl", "VPPrecond", song(), "SongUNet", SONG, beta_d=19.9, beta_min=0.1), {"trust": True}),
        "score-sde": (score_sde_file(tmp_path / "ncsn.pth", ncsn, sigmas), {"config": VE}),
        "guided-diffusion": (tmp_path / "adm.pt", {"config": ADM_CONFIG}),
    }


def _same(one: Model, other: Model) -> None:
    for what in ("shape", "classes", "null_label", "fingerprint"):
        assert getattr(one, what) == getattr(other, what)
    assert one.denoiser.schedule.to_config() == other.denoiser.schedule.to_config()
    mine, theirs = one.denoiser.network.state_dict(), other.denoiser.network.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(sampled(one), sampled(other))


@pytest.mark.parametrize("name", ["edm", "vp", "score-sde", "guided-diffusion"])
def test_converted_checkpoints_are_the_same_to_the_bit(tmp_path: Path, checkpoints: dict, name: str) -> None:
    path, options = checkpoints[name]
    model = load_checkpoint(path, **options)
    folder = convert(path, tmp_path / "new" / "folder", **options)
    assert {str(file.relative_to(folder.folder)) for file in folder.folder.rglob("*.*")} == {"fewstep.json", "unet/model.safetensors"}
    assert oct(folder.folder.stat().st_mode & 0o777) == oct(0o777 & ~_umask())
    convert(path, tmp_path / "one.safetensors", **options)
    save_single_file(folder, tmp_path / "two.safetensors")
    for other in (folder, load_model(tmp_path / "new" / "folder"), load_model(tmp_path / "one.safetensors")):
        _same(model, other)
    _same(model, load_checkpoint(tmp_path / "two.safetensors", format="safetensors"))
    convert(tmp_path / "two.safetensors", tmp_path / "again")  # what needs no trust and no config any more
    _same(model, load_model(tmp_path / "again"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["digits-edm", "digits-ddpm", "digits-edm-3step"])
def test_a_unet_of_diffusers_as_a_single_file(tmp_path: Path, name: str) -> None:
    model = load_model(name)
    path = save_single_file(model, tmp_path / "digits.safetensors")
    _same(model, load_model(path))
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["fewstep"])
    assert said["network"]["class"] == "UNet2DModel" and not any(key.startswith("_") for key in said["network"]["options"])


def test_what_cannot_be_written_down(tmp_path: Path) -> None:
    model = load_model("digits-edm")
    own = Model("mine", type(model.denoiser)(model.denoiser.network, model.denoiser.schedule, "edm(0.5)", lambda t: 3 * t), model.shape)
    function = Model("mine", type(model.denoiser)(lambda x, t: x, model.denoiser.schedule, "sample"), model.shape)
    for bad, path, says in [
        (own, "a.safetensors", "mine cannot be written down: its time is a function of your own"),
        (function, "a.safetensors", "its network is a function of your own"),
        (model, "a.bin", r"a single file is named \*.safetensors"),
        (load_model("digits-dsno"), "a.safetensors", "is an operator student"),
    ]:
        with pytest.raises(ModelError, match=says):
            save_single_file(bad, tmp_path / path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        save_single_file(model, tmp_path / "file" / "a.safetensors")


def test_nothing_half_written_is_left(tmp_path: Path, checkpoints: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = checkpoints["vp"]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError):
        convert(path, out / "a")  # not trusted
    (tmp_path / "cut.pkl").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        convert(tmp_path / "cut.pkl", out / "a", **options)
    with pytest.raises(ArtifactError, match="out is there already: name another"):
        convert(path, out, **options)
    with pytest.raises(ArtifactError, match="is a file"):
        convert(path, path / "a", **options)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.models.loaders.save_file", full)
    for name in ("a", "a.safetensors"):
        with pytest.raises(ArtifactError, match="No space left"):
            convert(path, out / name, **options)
    assert list(out.iterdir()) == []


def test_damaged_single_files_and_folders(tmp_path: Path, checkpoints: dict) -> None:
    path, options = checkpoints["edm"]
    convert(path, tmp_path / "whole.safetensors", **options)
    weights, meta = load_file(tmp_path / "whole.safetensors"), None
    folder = convert(path, tmp_path / "folder", **options).folder
    meta = json.loads((folder / "fewstep.json").read_text())
    cut = tmp_path / "cut.safetensors"
    for length in (0, 4, 200, -1):
        cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:length])
        with pytest.raises(ModelError, match="cannot read .*cut.safetensors as safetensors.*fetch or make it again"):
            load_checkpoint(cut)

    def says(words: str, header: dict | str, tensors: dict | None = None) -> None:
        save_file(weights if tensors is None else tensors, cut, {"fewstep": header if isinstance(header, str) else json.dumps(header)})
        with pytest.raises(ModelError, match=words) as error:
            load_checkpoint(cut)
        assert "cut.safetensors" in str(error.value)

    says("damaged", "{")
    says("does not describe a model: KeyError", {})
    for key in ("network", "schedule", "prediction", "time", "shape", "classes"):
        says("does not describe a model", {name: value for name, value in meta.items() if name != key})
    says("unknown prediction type", {**meta, "prediction": "noise"})
    says("unknown form of a network's time", {**meta, "time": {**meta["time"], "form": "lag"}})
    says("unknown network class", {**meta, "network": {"class": "os.system", "options": {}}})
    says("unknown noise schedule", {**meta, "schedule": {"law": "mine"}})
    says("the file lacks map_layer0.weight", meta, {key: value for key, value in weights.items() if key != "map_layer0.weight"})
    (folder / "unet" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.safetensors"):
        load_model(folder)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file at .*nowhere.pkl: name a checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pkl", trust=True)
    with pytest.raises(ModelError, match="no file at"):
        load_checkpoint(tmp_path)
    for name, content in {"a.pt": {"weight": torch.ones(2)}, "b.pt": [1, 2], "c.pt": {1: 2}, "d.pt": {"a": 1}}.items():
        torch.save(content, tmp_path / name)
    for name, options, says in [
        ("a.pt", {}, f"does not show which format it has: pass format=, one of {', '.join(FORMATS)}"),
        ("a.pt", {"format": "score_sde"}, "unknown format 'score_sde': did you mean score-sde"),
        ("a.pt", {"format": "score-sde", "config": VP}, "the weights have weight, which no NCSN"),
        ("a.pt", {"format": "guided-diffusion", "config": ADM_CONFIG}, "no guided-diffusion U-Net"),
        ("a.pt", {"format": "safetensors"}, "does not show which format"),
        ("a.pt", {"format": "edm"}, "is a pickle"),
        ("b.pt", {}, "holds a list, not a mapping"),
        ("c.pt", {}, "holds a dict, not a mapping of names"),
        ("d.pt", {"format": "guided-diffusion"}, "is not a state dict"),
    ]:
        with pytest.raises(ModelError, match=says):
            load_checkpoint(tmp_path / name, **options)
    (tmp_path / "text.pth").write_text("not a file of torch's")
    with pytest.raises(ModelError, match="text.pth"):
        load_checkpoint(tmp_path / "text.pth")
    for name in ("digits-edm", tmp_path):
        with pytest.raises(ModelError, match="is no file: format and config are for checkpoint files"):
            load_model(name, format="edm")
