"""Checkpoints of ScoreSDE and guided-diffusion."""

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.models.formats.test_checkpoints import FLOAT32, sampled
from tests.models.networks.test_unets import ADM, NCSNpp, state_of
from torch import Tensor, nn

from fewstep import DiscreteVP, ModelError
from fewstep.models.formats.checkpoints import load_checkpoint

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
@pytest.mark.every(9)
def test_score_sde_against_its_own_network(tmp_path: Path, name: str) -> None:
    options, config = SCORE_SDE[name]
    network = NCSNpp(**options)
    ve = config["sde"] == "ve"
    sigmas = torch.exp(torch.linspace(math.log(50), math.log(0.01), 10, dtype=torch.float64)) if ve else None
    model = load_checkpoint(score_sde_file(tmp_path / "checkpoint_8.pth", network, sigmas), config=config)
    schedule, y = model.schedule, torch.randn(2, 3, 8, 8)
    for share in (0.01, 0.3, 1.0):
        t = torch.tensor(round(share * schedule.t_max) if isinstance(schedule, DiscreteVP) else share * schedule.t_max, dtype=torch.float64)
        x0, alpha, sigma = model(y, t), float(schedule.alpha(t)), float(schedule.sigma(t))
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


@pytest.mark.slow
def test_score_sde_weights_of_the_model_itself(tmp_path: Path) -> None:
    network = NCSNpp(taps=[1, 1])
    path = score_sde_file(tmp_path / "a.pth", network)
    averaged, own = (load_checkpoint(path, config={**VP, "fir": False, "weights": which}) for which in ("ema", "model"))
    key = "map_layer0.bias"
    torch.testing.assert_close(own.network.state_dict()[key], averaged.network.state_dict()[key] + 1)
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
@pytest.mark.every(3)
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
@pytest.mark.every(9)
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
    steps, schedule = config.get("diffusion_steps", 1000), model.schedule
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
        x0 = model(x, torch.tensor(t, dtype=torch.float64), labels)
        torch.testing.assert_close(x0, expected, rtol=FLOAT32, atol=FLOAT32 / math.sqrt(alpha_bar))
    sampled(model)
    if cond:
        with pytest.raises(ModelError, match="a class for every image"):
            model(x, torch.tensor(1.0))


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
@pytest.mark.every(3)
def test_guided_diffusion_options_that_lack_or_contradict(tmp_path: Path, config: dict, change: dict, says: str) -> None:
    state = {**state_of(ADM(), torch.tensor([0])), **change}
    path = tmp_path / "model.pt"
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(ModelError, match=says) as error:
        load_checkpoint(path, config={key: value for key, value in {**ADM_CONFIG, **config}.items() if value is not None})
    assert str(path) in str(error.value) and "\n" not in str(error.value)
