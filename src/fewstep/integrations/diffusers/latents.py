"""From latents to pictures, by the decoder of a pipeline, as its own call does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.integrations.diffusers.pipelines import is_called_directly
from fewstep.runtime.errors import ModelError

__all__ = ["decode_latents"]


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor, *, height: int | None = None, width: int | None = None) -> Tensor:  # noqa: ANN401
    """Decode samples of a pipeline's model to pictures ``[B, 3, H, W]`` in [-1, 1], float32, one at a time.

    It does what the pipeline's own call does with its latents: Stable Diffusion 1, 2, XL and 3, Flux and DiT. A pipeline with a safety
    checker has its pictures checked.

    Args:
        pipe: the pipeline, which is left as it is.
        latents: samples ``[B, *D]`` of ``fewstep.from_pipeline(pipe, ...)``, on any device.
        height, width: of the pictures in pixels, for Flux, whose latents do not show them; by default those of `from_pipeline`.

    Raises:
        ModelError: a pipeline whose latents are not decoded here.

    Examples:
        ```python
        model = fewstep.from_pipeline(pipe, ["a red cat"])
        pictures = decode_latents(pipe, fewstep.sample(model, "unipc-2", nfe=8, guidance=5, seeds=range(4)))
        ```
    """
    kind, vae = type(pipe).__name__, getattr(pipe, "vae", None)
    if not is_called_directly(kind) or vae is None:
        raise ModelError(f"the latents of a {kind} are not decoded here: hand them to its own decoder")
    if latents.ndim == 3:  # Flux packs its latents
        side = pipe.default_sample_size * pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, height or side, width or side, pipe.vae_scale_factor)  # noqa: SLF001
    config, dtype = vae.config, vae.dtype
    wide = dtype == torch.float16 and config.get("force_upcast")  # a decoder that overflows in half
    if wide:
        vae.to(torch.float32)
    try:
        scaled = latents.to(vae.device, torch.float32)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (scaled.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            scaled = scaled * std / config.scaling_factor + mean
        else:
            scaled = scaled / config.scaling_factor + (config.get("shift_factor") or 0.0)
        made = torch.cat([vae.decode(one.to(vae.dtype), return_dict=False)[0] for one in scaled.split(1)])
    finally:
        if wide:
            vae.to(dtype)
    if getattr(pipe, "safety_checker", None) is not None:
        made = pipe.run_safety_checker(made, made.device, dtype)[0]
    return made.float().clamp(-1, 1).cpu()
