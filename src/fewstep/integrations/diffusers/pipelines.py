"""From a diffusers pipeline to a model of this library: its network, its conditioning and its guidance.

The prompts are encoded once and become labels: label ``k`` is the k-th prompt, and the one after the last is the negative prompt. So
everything that works on class-conditional models (calibrate, optimize, fit, bench) works on pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.integrations.diffusers.pipeline_calls import PipelineLoop, checked_calls
from fewstep.models.formats.diffusers_law import ends_clean, noise_law
from fewstep.models.guidance import Wrapped
from fewstep.models.model import Model
from fewstep.models.networks.calls import image_size, unwrapped
from fewstep.runtime.artifact import named_path, read_file
from fewstep.runtime.errors import ArtifactError, ModelError
from fewstep.runtime.front_door import whole

__all__ = ["PipelineModel", "from_pipeline", "is_called_directly", "read_prompts"]

AT_ONCE = 16  # prompts that are encoded together


@dataclass(frozen=True, eq=False, repr=False)
class PipelineModel(Model):
    """A pipeline's network as a `Model`, with a guidance scale and the prompts that its labels stand for.

    Attributes:
        guidance_scale: classifier-free guidance of calls, and of `sample` and the learners where none is named.
        prompts: one text for each label.
    """

    guidance_scale: float = 1.0
    prompts: tuple[str, ...] = ()

    @property
    def hosted(self) -> bool:
        """Whether its samplers run in a program that calls the network at every step: a pipeline does."""
        return True

    @property
    def led(self) -> bool:
        """Whether its pipeline's own calls answer, with their guidance."""
        return isinstance(self.network, PipelineLoop)

    def own_start(self, labels: Iterable[int] | Tensor) -> Tensor:
        """Return the states ``[B, *D]`` that the pipeline's own calls begin with, for ``fewstep.sample(model, ..., own_start, labels)``.

        Each is drawn as the call draws it, by its ``seed`` (0 if it says none).

        Args:
            labels: numbers of calls, ``[B]``.

        Raises:
            ModelError: a pipeline that is not led by its calls, or a label that none of them has.
        """
        if not isinstance(self.network, PipelineLoop):
            raise ModelError(
                "only a pipeline that is led by its calls has states of its own to begin with: pass calls=[...] to from_pipeline"
            )
        wanted = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        for label in wanted:
            if whole(label, "a label", ModelError) not in range(len(self.prompts)):
                raise ModelError(f"labels are the numbers of calls, 0 to {len(self.prompts) - 1}, got {label}")
        if not wanted:
            raise ModelError("no labels: say the number of a call, or several")
        return torch.cat([self.network.start(label) for label in wanted])

    @property
    def default_guidance(self) -> float:
        return self.guidance_scale

    @property
    def conditional(self) -> Denoiser:
        return Wrapped(self.schedule, super().__call__)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Estimate the clean image ``x0 [B, *D]`` with guidance; ``cond`` are labels ``[B]``, by default those of the prompts in turn."""
        if cond is None and self.classes is not None:
            labels = self.labels(range(len(x)))
            cond = None if labels is None else labels.to(x.device)
        guided = self.guided(self.guidance_scale)
        assert not isinstance(guided, FlowMap)  # a pipeline's network is no student
        return guided(x, t, cond)


def read_prompts(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        ModelError: it cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in read_file(named_path(path)).decode("utf-8").splitlines()]
    except (ArtifactError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the prompts in {path}: {error}; it should be a text file with one prompt on each line") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ModelError(f"{path} has no prompts: write one on each line")
    return prompts


def from_pipeline(
    pipe: Any,  # noqa: ANN401 - a diffusers pipeline
    prompts: str | Path | Sequence[str] | None = None,
    *,
    calls: Sequence[Mapping[str, Any]] | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    control_image: Any = None,  # noqa: ANN401 - what the pipeline's own image processor takes
    embedded_guidance: float = 3.5,
) -> PipelineModel:
    """Return a diffusers pipeline as a model, conditioned on its own calls or on prompts.

    With ``calls`` any pipeline will do whose loop follows its scheduler: its own call is the denoiser, with all that the call does
    (pictures, ControlNets, adapters, guiders, several experts), and its network has no gradients. With ``prompts`` alone, the networks of
    some pipelines are called directly, with gradients: unconditional and class-conditional ones (``UNet2DModel``, DiT), Stable Diffusion
    1, 2 and XL, with a ControlNet or without, Stable Diffusion 3 and Flux, and the image-to-image and inpainting pipelines of these, which
    use the same network; any other is led by calls with those prompts. Samplers end at the clean image, as those of pipelines do. The
    pipeline is left as it is: its weights, dtype, mode and device.

    Args:
        pipe: the pipeline, on the device and in the dtype that it is used in.
        prompts: one, several, or a `Path` to a text file with one on each line; none for networks without text.
        calls: the arguments of the pipeline's call for each label, as ``[dict(prompt=..., image=..., guidance_scale=...), ...]``, all of
            one size. ``seed``, a whole number, is for what a call draws beside its latents.
        negative_prompt: the text that guidance leads away from; by default the pipeline's own.
        guidance_scale: classifier-free guidance of the model.
        height, width: the size of the pictures in pixels; by default that of training.
        num_frames: of videos, which pipelines make that are led by calls.
        control_image: the picture that a ControlNet follows.
        embedded_guidance: the guidance scale that Flux's network takes as an input; it needs no other.

    Raises:
        ModelError: neither prompts nor calls where they are needed, prompts that are not wanted, a network that is given more than prompts,
            a loop that cannot be led (why), or a noise law that is not known.
    """
    kind = type(pipe).__name__
    if isinstance(prompts, Path):
        prompts = read_prompts(prompts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
    said = {"negative_prompt": negative_prompt, "height": height, "width": width, "num_frames": num_frames, "control_image": control_image}
    said = {key: value for key, value in said.items() if value is not None} | (
        {"guidance_scale": guidance_scale} if guidance_scale != 1 else {}
    )
    if not hasattr(type(pipe), "components") or getattr(pipe, "scheduler", None) is None:
        if hasattr(pipe, "load_components"):
            raise ModelError(f"the scheduler of this {kind} is not loaded yet: run load_components() first")
        raise ModelError(f"a {kind} is no diffusers pipeline with a scheduler: make a fewstep.Model of a network of your own")
    if calls is not None:
        if texts or said or embedded_guidance != 3.5:
            raise ModelError(
                f"calls say all themselves: put {', '.join(['prompts'] * bool(texts) + [*said]) or 'embedded_guidance'} into them"
            )
        return _by_calls(pipe, checked_calls(pipe, calls))
    if not is_called_directly(kind):
        if not texts:
            raise ModelError(f"a {kind} is led by its own calls: pass calls=[dict(prompt=...), ...], its arguments as you type them")
        return _by_calls(pipe, checked_calls(pipe, [{"prompt": text, **said} for text in texts]))
    if num_frames is not None:
        raise ModelError(f"a {kind} makes no videos: leave num_frames out")
    read, attribute = _FAMILIES[kind]
    network = getattr(pipe, attribute)
    if texts and getattr(pipe, "encode_prompt", None) is None:
        raise ModelError(f"a {type(pipe).__name__} takes no prompts: leave them out")
    request = PipelineRequest(pipe, network, texts, negative_prompt, height, width, control_image, embedded_guidance)
    with torch.no_grad():
        conditioned, shape, classes, null_label, mu = read(request)
    law = noise_law(pipe.scheduler.config, mu=mu, to_clean=ends_clean(pipe.scheduler.config))
    labels = {"classes": classes, "null_label": null_label, "guidance_scale": guidance_scale, "prompts": tuple(texts)}
    return PipelineModel(conditioned, law.schedule, law.prediction, shape=shape, time=law.time, name=_name_of(pipe), **labels)


def is_called_directly(kind: str) -> bool:
    """Return whether `from_pipeline` calls the network of a class of pipeline by itself, where others are led by their own calls."""
    return kind in _FAMILIES


def _by_calls(pipe: Any, calls: list[dict[str, Any]]) -> PipelineModel:  # noqa: ANN401
    """Return the model of a pipeline that is led by its own calls; their guidance is a part of it, so its scale is 1."""
    loop = PipelineLoop(pipe, calls)
    prompts = tuple(str(call.get("prompt", f"call {k}")) for k, call in enumerate(calls))
    about = {"shape": loop.shape, "time": loop.law.time, "dtype": loop.dtype, "name": _name_of(pipe)}
    return PipelineModel(loop, loop.law.schedule, loop.law.prediction, classes=len(calls), prompts=prompts, **about)


def _name_of(pipe: Any) -> str:  # noqa: ANN401
    return Path(str(getattr(pipe, "name_or_path", "") or getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)).name


@dataclass(frozen=True, eq=False)
class PipelineRequest:
    """The arguments of one call of `from_pipeline`, with the network."""

    pipe: Any
    network: Any
    texts: list[str]
    negative: str | None
    height: int | None
    width: int | None
    control_image: Any
    embedded_guidance: float

    def latent_size(self, by_default: int | Sequence[int]) -> tuple[int, int]:
        """Return height and width of the latents."""
        default = (by_default, by_default) if isinstance(by_default, int) else tuple(by_default)
        sizes = [
            side if wanted is None else wanted // self.pipe.vae_scale_factor for side, wanted in zip(default, self.pixels, strict=True)
        ]
        return sizes[0], sizes[1]

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        return self.height, self.width

    def encoded(self, **options: Any) -> list[Tensor]:  # noqa: ANN401
        """Return the pipeline's encodings of the prompts and, in the last row, of the negative prompt: ``[P+1, ...]`` each.

        Args:
            options: further arguments of the pipeline's ``encode_prompt``.

        Raises:
            ModelError: there are no prompts.
        """
        if not self.texts:
            raise ModelError(f"a {type(self.pipe).__name__} needs prompts: pass one, several, or the Path of a text file")
        parts: list[list[Tensor]] = []
        nothing: list[Tensor] = []
        for start in range(0, len(self.texts), AT_ONCE):
            texts = self.texts[start : start + AT_ONCE]
            negative = None if self.negative is None else [self.negative] * len(texts)
            answer = self.pipe.encode_prompt(
                prompt=texts,
                device=self.pipe._execution_device,  # noqa: SLF001 - where the pipeline itself encodes
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=negative,
                **options,
            )
            parts.append([answer[k] for k in range(0, len(answer), 2)])
            nothing = nothing or [answer[k][:1] for k in range(1, len(answer), 2)]
        return [torch.cat([*(part[k] for part in parts), nothing[k]]) for k in range(len(nothing))]


Family = tuple[nn.Module, tuple[int, ...], int | None, int | None, float | None]  # network, shape, classes, null label, mu


class _Conditioned(nn.Module):
    """A network with tables of conditions, one row for each label; they are part of the model's fingerprint, and its call is not."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor], **tables: Tensor) -> None:
        super().__init__()
        self.network, self.call = network, call
        for name, table in tables.items():
            self.register_buffer(name, table)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.call(self, x, time, labels)

    def rows(self, name: str, labels: Tensor | None, x: Tensor) -> Tensor:
        """Return a table's rows ``[B, ...]`` for the labels ``[B]``; the first row for each sample where there are none."""
        table = getattr(self, name)
        picked = table[labels] if labels is not None else table[:1].expand(len(x), *table.shape[1:])
        return picked.to(x.dtype) if picked.is_floating_point() else picked


def _plain_unet(request: PipelineRequest) -> Family:
    def call(net: _Conditioned, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        given = {} if labels is None else {"class_labels": labels}
        return net.network(x, time, return_dict=False, **given)[0]

    config = request.network.config
    return _Conditioned(request.network, call), (config.in_channels, *image_size(request.network)), config.num_class_embeds, None, None


def _text_unet(request: PipelineRequest) -> Family:
    """Condition the network of Stable Diffusion 1, 2 or XL, with a ControlNet or without."""
    unet, pipe = request.network, request.pipe
    channels, control = unet.config.in_channels, getattr(pipe, "controlnet", None)
    for option, meaning in _MORE_INPUTS.items():
        if unet.config.get(option) is not None:
            raise ModelError(
                f"this network takes {meaning} ({option}) beside the prompt: pass calls=[dict(prompt=...)] rather than prompts"
            )
    if channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"this network takes {channels} channels, of which {pipe.vae.config.latent_channels} are the state (an inpainting network, for "
            "example): pass calls=[dict(prompt=..., image=...)] rather than prompts"
        )
    if control is not None and type(unwrapped(control)).__name__ != "ControlNetModel":
        raise ModelError(f"a {type(control).__name__} is led by calls: pass calls=[dict(prompt=..., image=...)] rather than prompts")
    if pipe.config.get("requires_aesthetics_score"):
        raise ModelError("this network takes an aesthetic score (the refiner of SDXL): pass calls=[dict(prompt=...)] rather than prompts")
    height, width = request.latent_size(unet.config.sample_size)
    tables = request.encoded()
    xl = len(tables) == 2
    named = {"embeds": tables[0]}
    if xl:
        sizes = [height * pipe.vae_scale_factor, width * pipe.vae_scale_factor]
        ids = torch.tensor([[*sizes, 0, 0, *sizes]], dtype=tables[0].dtype, device=tables[0].device)  # original, corner, target
        named |= {"pooled": tables[1], "time_ids": ids}
    if control is not None:
        if request.control_image is None:
            raise ModelError("a ControlNet needs control_image, the picture that it follows")
        pixels = {"height": height * pipe.vae_scale_factor, "width": width * pipe.vae_scale_factor}
        picture = pipe.control_image_processor.preprocess(request.control_image, **pixels)
        named["picture"] = picture.to(tables[0].device, tables[0].dtype)

    def call(net: _Conditioned, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        given: dict[str, Any] = {"encoder_hidden_states": net.rows("embeds", labels, x), "return_dict": False}
        if xl:
            time_ids = net.rows("time_ids", None, x)
            given["added_cond_kwargs"] = {"text_embeds": net.rows("pooled", labels, x), "time_ids": time_ids}
        if control is not None:
            down, mid = net.get_submodule("control")(x, time, controlnet_cond=net.rows("picture", None, x), **given)
            given |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return net.network(x, time, **given)[0]

    conditioned = _Conditioned(unet, call, **named)
    if control is not None:
        conditioned.add_module("control", control)
    return conditioned, (channels, height, width), len(request.texts), len(request.texts), None


def _stable_diffusion_3(request: PipelineRequest) -> Family:
    height, width = request.latent_size(request.network.config.sample_size)
    embeds, pooled = request.encoded(prompt_2=None, prompt_3=None)

    def call(net: _Conditioned, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        text = {"encoder_hidden_states": net.rows("embeds", labels, x), "pooled_projections": net.rows("pooled", labels, x)}
        return net.network(hidden_states=x, timestep=time, return_dict=False, **text)[0]

    conditioned = _Conditioned(request.network, call, embeds=embeds, pooled=pooled)
    tokens = (height // request.network.config.patch_size) * (width // request.network.config.patch_size)
    shape = (request.network.config.in_channels, height, width)
    return conditioned, shape, len(request.texts), len(request.texts), _mu(request.pipe, tokens)


def _flux(request: PipelineRequest) -> Family:
    """Condition the network of Flux; its state is packed, ``[tokens, channels]``, and there is no negative prompt."""
    if not request.texts:
        raise ModelError("a FluxPipeline needs prompts: pass one, several, or the Path of a text file")
    pipe, network = request.pipe, request.network
    side = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = (2 * ((side if wanted is None else wanted) // (2 * pipe.vae_scale_factor)) for wanted in request.pixels)
    embeds, pooled, text_ids = pipe.encode_prompt(prompt=request.texts, prompt_2=None, device=pipe._execution_device)  # noqa: SLF001
    places = pipe._prepare_latent_image_ids(1, height // 2, width // 2, embeds.device, embeds.dtype)  # noqa: SLF001
    guided, channels = network.config.guidance_embeds, 4 * pipe.vae.config.latent_channels
    if network.config.in_channels != channels:
        raise ModelError(
            f"this network takes {network.config.in_channels} channels, of which {channels} are the state (a control or fill network, for "
            "example): pass calls=[dict(prompt=..., image=...)] rather than prompts"
        )
    scale = torch.tensor([request.embedded_guidance], device=embeds.device)

    def call(net: _Conditioned, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return net.network(
            hidden_states=x,
            timestep=time.to(x.dtype) / 1000,
            guidance=net.rows("embedded", None, x) if guided else None,
            encoder_hidden_states=net.rows("embeds", labels, x),
            pooled_projections=net.rows("pooled", labels, x),
            txt_ids=net.text_ids,
            img_ids=net.places,
            return_dict=False,
        )[0]

    tokens = (height // 2) * (width // 2)
    conditioned = _Conditioned(network, call, embeds=embeds, pooled=pooled, text_ids=text_ids, places=places, embedded=scale)
    return conditioned, (tokens, network.config.in_channels), len(request.texts), None, _mu(pipe, tokens)


def _dit(request: PipelineRequest) -> Family:
    config = request.network.config

    def call(net: _Conditioned, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ModelError("a DiT is class-conditional: pass labels as cond")
        output = net.network(x, timestep=time, class_labels=labels).sample
        return output[:, : x.shape[1]]  # it may predict a variance too

    classes = int(config.num_embeds_ada_norm)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return _Conditioned(request.network, call), shape, classes, classes, None


def _mu(pipe: Any, tokens: int) -> float | None:  # noqa: ANN401
    """Return the shift of a flow for pictures of so many tokens, linear between two sizes (arXiv 2403.03206); None if it is fixed."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return least + (most - least) * (tokens - low) / (high - low)


_MORE_INPUTS = {  # options of a text-conditional network by which it takes more
    "time_cond_proj_dim": "an embedding of the guidance scale, as LCM's does",
    "encoder_hid_dim_type": "embeddings of a picture, as an IP-adapter's does",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
}


def _variants(family: str, *extra: str) -> list[str]:
    """Return the names of a family's pipelines: text to image, image to image, inpainting."""
    return [f"{family}{one}{task}Pipeline" for one in ("", *extra) for task in ("", "Img2Img", "Inpaint")]


_FAMILIES: dict[str, tuple[Callable[[PipelineRequest], Family], str]] = {  # class of pipeline -> what reads it, where its network is
    **dict.fromkeys(["DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline"], (_plain_unet, "unet")),
    "DiTPipeline": (_dit, "transformer"),
    **dict.fromkeys(_variants("StableDiffusion", "ControlNet"), (_text_unet, "unet")),
    **dict.fromkeys(_variants("StableDiffusionXL", "ControlNet"), (_text_unet, "unet")),
    **dict.fromkeys(_variants("StableDiffusion3"), (_stable_diffusion_3, "transformer")),
    **dict.fromkeys(_variants("Flux"), (_flux, "transformer")),
}
