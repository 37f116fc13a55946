"""State dicts of ScoreSDE (Song et al., arXiv 2011.13456) and guided-diffusion (Dhariwal and Nichol, arXiv 2105.05233).

Each gives the description of a model (see `folders.describe`) and its weights under the names of `unets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.core.schedule import DiscreteVP, NoiseSchedule, VarianceExploding, VPLinear
from fewstep.models.formats.description import description
from fewstep.models.networks.calls import NetworkTime
from fewstep.runtime.errors import ModelError, look_up, nearest

__all__ = ["Weights", "at_the_end", "guided_network", "score_sde_network"]

Weights = dict[str, Tensor]

GUIDED = {  # guided-diffusion's flags; None must be said, or is read off the weights
    "image_size": None,
    "num_heads": None,
    "num_head_channels": None,
    "use_new_attention_order": None,
    "noise_schedule": None,
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
    "predict_xstart": False,
    "learn_sigma": None,
    "num_channels": None,
    "num_res_blocks": None,
    "channel_mult": None,
    "attention_resolutions": None,
    "class_cond": None,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
SCORE_SDE = {  # ScoreSDE's options, by the names of its configurations; None must be said, or is read off the weights
    "image_size": None,
    "sde": None,
    "continuous": None,
    "fir": None,
    "fir_kernel": [1, 3, 3, 1],
    "centered": None,
    "scale_by_sigma": None,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "sigma_min": None,
    "sigma_max": None,
    "num_scales": 1000,
    "weights": "ema",
    "nf": None,
    "num_channels": None,
    "ch_mult": None,
    "num_res_blocks": None,
    "attn_resolutions": None,
    "embedding_type": None,
    "progressive": None,
    "progressive_input": None,
    "resblock_type": "biggan",
    "skip_rescale": True,
    "progressive_combine": "sum",
}


class _Walk:
    """A walk through ScoreSDE's numbered modules in their order, which collects their weights under EDM's names."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.modules: dict[int, Weights] = {}
        for key, value in weights.items():
            start, number, rest = (key.split(".", 2) + ["", ""])[:3]
            if start != "all_modules" or not number.isdigit():
                raise ModelError(f"the weights have {key}, which no NCSN++ has: is it another format?")
            self.modules.setdefault(int(number), {})[rest] = value
        self.i, self.weights = 0, Weights()

    def has(self, name: str, ahead: int = 0) -> bool:
        return name in self.modules.get(self.i + ahead, {})

    def take(self, to: str, names: Mapping[str, str]) -> Weights:
        """Take the weights of the next module.

        Args:
            to: its name here.
            names: all of its parts, their names -> ours.

        Raises:
            ModelError: it has other parts.
        """
        module, wanted = (
            self.modules.get(self.i, {}),
            {f"{name}{kind}": ours for name, ours in names.items() for kind in ("weight", "bias")},
        )
        if set(module) != set(wanted):
            raise ModelError(
                f"all_modules.{self.i} has {sorted(module)} where {sorted(wanted)} should be: it is no NCSN++ of BigGAN blocks"
            )
        for name, ours in wanted.items():
            self.weights[f"{to}{ours}.{name.rpartition('.')[2]}"] = module[name]
        self.i += 1
        return module

    def block(self, to: str) -> int:
        """Take a residual block, and return its width."""
        names = {"GroupNorm_0.": ".norm0", "Conv_0.": ".conv0", "Dense_0.": ".affine", "GroupNorm_1.": ".norm1", "Conv_1.": ".conv1"}
        return len(self.take(to, {**names, "Conv_2.": ".skip"} if self.has("Conv_2.weight") else names)["Conv_0.weight"])

    def attention(self, to: str) -> bool:
        """Take attention, if it is next, and return whether; its three maps become one, of channels ordered (channel, which map)."""
        if not self.has("NIN_0.W"):
            return False
        module = self.modules[self.i]
        maps = [(module.pop(f"NIN_{k}.W").T, module.pop(f"NIN_{k}.b")) for k in range(4)]
        self.take(to, {"GroupNorm_0.": ".norm2"})
        self.weights[f"{to}.qkv.weight"] = torch.stack([weight for weight, _ in maps[:3]], 1).flatten(0, 1)[..., None, None]
        self.weights[f"{to}.qkv.bias"] = torch.stack([bias for _, bias in maps[:3]], 1).flatten()
        self.weights[f"{to}.proj.weight"], self.weights[f"{to}.proj.bias"] = maps[3][0].contiguous()[..., None, None], maps[3][1]
        return True


def _score_sde_ladder(walk: _Walk, size: int) -> dict[str, Any]:
    """Walk through all modules, and return the options that they show."""
    blocks = [module for _, module in sorted(walk.modules.items()) if "Conv_1.weight" in module]
    changed = [m for m in blocks if "Conv_2.weight" in m and m["Conv_0.weight"].shape[0] == m["Conv_0.weight"].shape[1]]
    levels = 1 + len(changed) // 2
    each, keys = (len(blocks) - 3 * levels) // (2 * levels), [f"{size >> level}x{size >> level}" for level in range(levels)]
    fourier = walk.has("W")
    if fourier:
        walk.weights["map_noise.freqs"], walk.i = walk.modules[0]["W"], 1
    for name in ("map_layer0", "map_layer1"):
        walk.take(name, {"": ""})
    nf, channels = walk.take(f"enc.{keys[0]}_conv", {"": ""})["weight"].shape[:2]
    widths, attending, inputs = [], [], "none"
    for level, key in enumerate(keys):
        if level:
            walk.block(f"enc.{key}_down")
            inputs = _score_sde_input(walk, key)
        attends, width = False, nf
        for k in range(each):
            width = walk.block(f"enc.{key}_block{k}")
            attends = walk.attention(f"enc.{key}_block{k}")
        widths.append(width)
        attending += [size >> level] if attends else []
    output = _score_sde_decoder(walk, keys, each)
    return {
        "nf": nf,
        "num_channels": channels,
        "ch_mult": [width // nf for width in widths],
        "num_res_blocks": each,
        "attn_resolutions": attending,
        "embedding_type": "fourier" if fourier else "positional",
        "progressive_input": inputs,
        "progressive": output,
        **({"fir": True} if inputs == "residual" else {}),
    }


def _score_sde_decoder(walk: _Walk, keys: list[str], each: int) -> str:
    """Walk through the decoder's modules, and return the kind of output beside it."""
    walk.block(f"dec.{keys[-1]}_in0")
    walk.attention(f"dec.{keys[-1]}_in0")
    walk.block(f"dec.{keys[-1]}_in1")
    output = "none"
    for level, key in reversed(list(enumerate(keys))):
        if level < len(keys) - 1:
            walk.block(f"dec.{key}_up")
        for k in range(each + 1):
            walk.block(f"dec.{key}_block{k}")
        walk.attention(f"dec.{key}_block{each}")
        if level == len(keys) - 1 and len(keys) > 1 and walk.has("weight"):
            output = "output_skip"
        if output == "output_skip" or level == 0:
            walk.i += output == "output_skip" and level < len(keys) - 1  # doubling the picture has a number but no weights
            walk.take(f"dec.{key}_aux_norm", {"": ""})
            walk.take(f"dec.{key}_aux_conv", {"": ""})
    return output


def _score_sde_input(walk: _Walk, key: str) -> str:
    """Take the module of the input beside the encoder at a level, and return its kind."""
    if walk.has("Conv.weight", ahead=1) and walk.i not in walk.modules:  # halving the picture has a number but no weights
        walk.i += 1
        walk.take(f"enc.{key}_aux_skip", {"Conv.": ""})
        return "input_skip"
    if walk.has("Conv2d_0.weight"):
        walk.take(f"enc.{key}_aux_residual", {"Conv2d_0.": ""})
        return "residual"
    return "none"


def _averaged(file: Mapping[str, Any], which: str) -> tuple[Weights, Tensor | None]:
    """Return the weights of a ScoreSDE checkpoint, averaged over training or not, and its table of noise levels."""
    model = {key.removeprefix("module."): value for key, value in file.get("model", file).items()}
    sigmas = model.pop("sigmas", None)
    look_up(which, dict.fromkeys(("ema", "model")), "kind of weights", ModelError)
    if which == "ema" and "ema" in file:
        names = [key for key in model if key != "all_modules.0.W"]  # which is not trained, and so not averaged
        shadow = file["ema"]["shadow_params"]
        if [value.shape for value in shadow] != [model[key].shape for key in names]:
            raise ModelError(
                f"the {len(shadow)} averaged weights are not the model's {len(names)}: pass config weights = 'model' for those"
            )
        model.update(zip(names, shadow, strict=True))
    return model, sigmas


def score_sde_network(file: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Return the description and the weights of a ScoreSDE checkpoint (Song et al., arXiv 2011.13456).

    Args:
        file: the checkpoint.
        config: options that the weights do not show, by ScoreSDE's names.

    Raises:
        ModelError: options that are missing, unknown or contradicted by the weights, or a variant that is not known here.
    """
    weights, sigmas = _averaged(file, config.get("weights", "ema"))
    _said({**SCORE_SDE, **config}, "image_size", "sde")
    walk = _Walk({key: value.float() for key, value in weights.items()})
    read = _score_sde_ladder(walk, config["image_size"])
    c = _settings(config, SCORE_SDE, read, ("resblock_type", "skip_rescale", "progressive_combine"))
    if c["sde"] == "ve" and sigmas is not None:
        c["sigma_max"], c["sigma_min"] = (c[key] or float(sigmas[k]) for key, k in (("sigma_max", 0), ("sigma_min", -1)))
    _said(c, "fir", *(("sigma_min", "sigma_max") if c["sde"] == "ve" else ()))
    if c["fir"] and list(c["fir_kernel"]) != list(c["fir_kernel"])[::-1]:
        raise ModelError(f"fir_kernel {c['fir_kernel']} is not the same from both sides, and so not known here")
    fourier = c["embedding_type"] == "fourier"
    options = {
        "img_resolution": c["image_size"],
        "in_channels": c["num_channels"],
        "out_channels": c["num_channels"],
        "model_channels": c["nf"],
        "channel_mult": c["ch_mult"],
        "num_blocks": c["num_res_blocks"],
        "attn_resolutions": c["attn_resolutions"],
        "embedding_type": c["embedding_type"],
        "channel_mult_noise": 2 if fourier else 1,
        "encoder_type": {"none": "standard", "input_skip": "skip", "residual": "residual"}[c["progressive_input"]],
        "decoder_type": {"none": "standard", "output_skip": "skip"}[c["progressive"]],
        "resample_filter": c["fir_kernel"] if c["fir"] else [1, 1],
    }
    schedule, time = _score_sde_law(c, fourier)
    done = at_the_end(walk.weights, torch.neg) if c["sde"] == "ve" else walk.weights
    return description("SongUNet", options, schedule, "epsilon", time, (c["num_channels"],) + (c["image_size"],) * 2, None, None), done


def _score_sde_law(c: Mapping[str, Any], fourier: bool) -> tuple[NoiseSchedule, NetworkTime]:
    """Return the noise law, and the network's own time."""
    usual = {"vp": (True, False), "ve": (False, True)}  # of centered and scale_by_sigma
    if c["sde"] == "subvp":
        raise ModelError("sde 'subvp' has a noise law of its own, which fewstep does not have; vp and ve are known")
    centered, by_sigma = look_up(str(c["sde"]), usual, "sde", ModelError)
    centered, by_sigma = (usual if c[key] is None else c[key] for key, usual in (("centered", centered), ("scale_by_sigma", by_sigma)))
    if by_sigma != (c["sde"] == "ve") or (c["sde"] == "vp" and not centered):
        raise ModelError(f"sde {c['sde']!r} with scale_by_sigma = {by_sigma} and centered = {centered} is not known here")
    if c["sde"] == "ve":
        if not fourier or c["continuous"] is False:
            raise ModelError("sde 've' is known with the continuous noise levels of a fourier embedding only")
        gain = 1.0 if centered else 2.0  # their images are in [0, 1]; the network itself moves them to [-1, 1]
        return VarianceExploding(gain * c["sigma_min"], gain * c["sigma_max"]), NetworkTime("log", 1.0, 1 / gain)
    if fourier:
        return VPLinear(c["beta_min"], c["beta_max"]), NetworkTime("log", 1.0, 999.0)
    _said(c, "continuous")
    if c["continuous"]:
        return VPLinear(c["beta_min"], c["beta_max"]), NetworkTime("t", 999.0)
    steps = c["num_scales"]
    return DiscreteVP.linear(steps, c["beta_min"] / steps, c["beta_max"] / steps), NetworkTime()


def _settings(config: Mapping[str, Any], known: Mapping[str, Any], read: Mapping[str, Any], fixed: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of a checkpoint: those that its weights show, those of ``config``, and the defaults.

    Raises:
        ModelError: an unknown option, one that the weights contradict, or one of ``fixed`` that is not as it must be.
    """
    if unknown := sorted(set(config) - set(known)):
        raise ModelError(f"config has no option {unknown[0]!r} here: {nearest(unknown[0], known)}")
    for key, value in config.items():
        there = read.get(key, known[key] if key in fixed else value)
        if _listed(value) != _listed(there):
            why = "is not known here, only" if key in fixed else "but the weights show"
            raise ModelError(f"config says {key} = {value!r}, {'which ' if key in fixed else ''}{why} {there!r}")
    return {**known, **config, **read}


def _said(settings: Mapping[str, Any], *keys: str) -> None:
    if missing := [key for key in keys if settings[key] is None]:
        raise ModelError(f"the weights do not show {', '.join(missing)}: pass it in config, e.g. config={{{missing[0]!r}: ...}}")


def at_the_end(weights: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    """Return weights with those changed in which the output is linear: all of the last layer, or of the last of each level."""
    last = ("aux_conv.weight", "aux_conv.bias", "out_conv.weight", "out_conv.bias")
    return {key: change(value) if key.endswith(last) else value for key, value in weights.items()}


def _guided_ladder(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options that the weights of guided-diffusion show.

    Levels end where an output block has a second residual block.
    """
    if "time_embed.0.weight" not in weights or "out.2.weight" not in weights:
        raise ModelError("the weights have no time_embed or no out.2: they are no guided-diffusion U-Net (a classifier, perhaps)")
    if any(key.endswith((".op.weight", ".conv.weight")) for key in weights):
        raise ModelError("resblock_updown = False (a convolution between levels) is not known here")
    nf, outputs = (
        weights["time_embed.0.weight"].shape[1],
        1 + max(int(key.split(".")[1]) for key in weights if key.startswith("output_blocks.")),
    )
    ends = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.in_layers.0.weight" in weights]
    each = ends[0] if ends else outputs - 1
    first = range(1, outputs, each + 1)  # in both halves a level takes each + 1 blocks
    widths = [weights[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in first]
    channels, produced = weights["input_blocks.0.0.weight"].shape[1], weights["out.2.weight"].shape[0]
    if weights["input_blocks.1.0.emb_layers.1.weight"].shape[0] != 2 * widths[0]:
        raise ModelError("use_scale_shift_norm = False is not known here")
    if produced not in (channels, 2 * channels) or channels == 6:
        raise ModelError(f"a network from {channels} to {produced} channels is no image model (an upsampler takes two images at once)")
    return {
        "num_channels": nf,
        "num_res_blocks": each,
        "channel_mult": [width // nf if width % nf == 0 else width / nf for width in widths],
        "attention": [f"input_blocks.{i}.1.qkv.weight" in weights for i in first],
        "learn_sigma": produced == 2 * channels,
        "class_cond": "label_emb.weight" in weights,
        "channels": channels,
    }


def guided_network(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Return the description and the weights of a guided-diffusion checkpoint (Dhariwal and Nichol, arXiv 2105.05233).

    Args:
        weights: of the checkpoint.
        config: options that the weights do not show, by guided-diffusion's names.

    Raises:
        ModelError: options that are missing, unknown or contradicted by the weights, or a variant that is not known here.
    """
    read = _guided_ladder(weights)
    _said({**GUIDED, **config}, "image_size", "use_new_attention_order", "noise_schedule")
    attending = [config["image_size"] >> level for level, attends in enumerate(read.pop("attention")) if attends]
    channels = read.pop("channels")
    c = _settings(config, GUIDED, {**read, "attention_resolutions": attending}, ("resblock_updown", "use_scale_shift_norm"))
    if (c["num_heads"] is None) == (c["num_head_channels"] is None):
        raise ModelError("the weights do not show the heads of attention: pass either num_heads or num_head_channels in config")
    size, classes = c["image_size"], len(weights["label_emb.weight"]) if c["class_cond"] else None
    heads = {"num_heads": c["num_heads"]} if c["num_heads"] else {"channels_per_head": c["num_head_channels"]}
    options = {
        "img_resolution": size,
        "in_channels": channels,
        "out_channels": channels,
        "label_dim": classes or 0,
        "model_channels": c["num_channels"],
        "channel_mult": c["channel_mult"],
        "num_blocks": c["num_res_blocks"],
        "attn_resolutions": c["attention_resolutions"],
        "channels_per_group": 1,
        "null_label": False,
        **heads,
    }
    steps, scale = c["diffusion_steps"], 1000 / c["diffusion_steps"]
    laws = {"linear": lambda: DiscreteVP.linear(steps, 1e-4 * scale, 0.02 * scale), "cosine": lambda: DiscreteVP.squared_cosine(steps)}
    schedule, time = look_up(str(c["noise_schedule"]), laws, "noise_schedule", ModelError)(), NetworkTime()
    time = NetworkTime("t", scale) if c["rescale_timesteps"] else time
    predicted = "sample" if c["predict_xstart"] else "epsilon"
    renamed = at_the_end(_guided_weights(weights, c), lambda w: w[:channels].clone())  # not the variances
    return description("DhariwalUNet", options, schedule, predicted, time, (channels, size, size), classes, None), renamed


def _guided_weights(weights: Mapping[str, Tensor], c: Mapping[str, Any]) -> Weights:
    """Return the weights under EDM's names."""
    size, each, levels = c["image_size"], c["num_res_blocks"], len(c["channel_mult"])
    keys = [f"{size >> level}x{size >> level}" for level in range(levels)]
    places = {"input_blocks.0.0": f"enc.{keys[0]}_conv", "time_embed.0": "map_layer0", "time_embed.2": "map_layer1"}
    places |= {"out.0": "out_norm", "out.2": "out_conv", "label_emb": "map_label"}
    places |= {"middle_block.0": f"dec.{keys[-1]}_in0", "middle_block.1": f"dec.{keys[-1]}_in0", "middle_block.2": f"dec.{keys[-1]}_in1"}
    for level, key in enumerate(keys):
        start, end = level * (each + 1), (levels - 1 - level) * (each + 1)
        places |= {f"input_blocks.{start}.0": f"enc.{key}_down"} if level else {}
        for k in range(each + 1):
            places |= {f"input_blocks.{start + k + 1}.{j}": f"enc.{key}_block{k}" for j in (0, 1) if k < each}
            places |= {f"output_blocks.{end + k}.{j}": f"dec.{key}_block{k}" for j in (0, 1)}
        if level:  # the last block of a level doubles the resolution, after its attention if it has some
            last = 2 if f"output_blocks.{end + each}.1.qkv.weight" in weights else 1
            places[f"output_blocks.{end + each}.{last}"] = f"dec.{keys[level - 1]}_up"
    parts = {"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "out_layers.0": "norm1", "out_layers.3": "conv1"}
    parts |= {"skip_connection": "skip", "norm": "norm2", "qkv": "qkv", "proj_out": "proj"}
    renamed = Weights()
    for key, value in weights.items():
        stem, kind = key.rpartition(".")[::2]
        place = stem if stem in places else ".".join(stem.split(".")[: 2 if stem.startswith("middle") else 3])
        part = stem.removeprefix(place).lstrip(".")
        if place not in places or (part and part not in parts):
            raise ModelError(f"the weights have {key}, which no guided-diffusion U-Net has")
        if part in ("qkv", "proj_out") and kind == "weight":
            value = value[..., None]  # theirs is a convolution over a row of pixels
        if part == "qkv":
            value = _qkv_order(value, c)
        renamed[f"{places[place]}{'.' if part else ''}{parts.get(part, '')}.{kind}"] = (
            value.T.contiguous() if stem == "label_emb" else value
        )
    return renamed


def _qkv_order(value: Tensor, c: Mapping[str, Any]) -> Tensor:
    """Return the rows of ``qkv [3C, ...]`` in EDM's order, (head, channel, which).

    Guided-diffusion's order is (head, which, channel), or the newer (which, head, channel).
    """
    width = len(value) // 3
    heads = c["num_heads"] or width // c["num_head_channels"]
    if heads < 1 or width % heads:
        raise ModelError(f"attention over {width} channels cannot have the heads that config says")
    if c["use_new_attention_order"]:
        return value.reshape(3, width, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    return value.reshape(heads, 3, width // heads, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _listed(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a tuple as JSON has it, a list; anything else as it is."""
    return list(value) if isinstance(value, tuple) else value
