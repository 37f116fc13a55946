"""The tab *Restore*: a picture with a painted hole, blurred, small or noisy; its samples, their mean, and how uncertain each pixel is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.apps.page.models import Models
from fewstep.apps.page.running import Running
from fewstep.apps.page.sample import whole_of
from fewstep.apps.page.shown import Strip, refused, strips, tiles
from fewstep.apps.page.workshop import Workshop
from fewstep.data.images import load_images, read_image
from fewstep.evaluate.metrics.distances import rmse
from fewstep.evaluate.pictures import to_uint8
from fewstep.evaluate.report import plots
from fewstep.inverse.restore import Restoration
from fewstep.inverse.tasks import gaussian_kernel, make_task, picture_shape
from fewstep.models.model import Model
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError, look_up
from fewstep.runtime.front_door import number

__all__ = ["WAYS", "RestoreRequest", "begin_restore", "mask_of", "picture_of", "shown_of", "tab", "uploaded"]

HOLE = "a painted hole"
WAYS = {  # what happened to a picture: the task of `fewstep restore`, and how `make_task` measures it
    HOLE: ("inpaint", ""),
    "blurred": ("deblur", "deblur:sd={sd}:size={size}:noise={noise}"),
    "half the size": ("upscale", "upscale:factor=2:noise={noise}"),
    "noisy": ("denoise", "denoise:noise={noise}"),
}
MOST_SAMPLES, MOST_NFE, SIDE = 32, 100, 128  # samples, evaluations, and pixels of a side that can be painted on
TRUE, MEASURED, MASK, KERNEL = "true.png", "measured.png", "mask.png", "kernel.npy"


@dataclass(frozen=True)
class RestoreRequest:
    """A picture to be restored, and how.

    Attributes:
        model: its name.
        way: what happened to the picture, one of `WAYS`.
        mask: ``[H, W]``, true where the picture is to be filled in.
        sd: of the blur, in pixels.
        noise: its standard deviation, of pixels in [-1, 1].
        num: samples.
        nfe: network evaluations of each.
        seed: of the first.
    """

    model: str
    way: str
    mask: Tensor | None = None
    sd: float = 1.2
    noise: float = 0.05
    num: int = 8
    nfe: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        look_up(self.way, WAYS, "way to measure a picture")
        if not 1 <= self.num <= MOST_SAMPLES or not 1 <= self.nfe <= MOST_NFE:
            raise FewstepError(f"1 to {MOST_SAMPLES} samples of 1 to {MOST_NFE} evaluations, got {self.num} and {self.nfe}")
        for name, low in (("noise", 0.0), ("sd", 0.1)):
            if not low <= number(getattr(self, name), name) <= 10:
                raise FewstepError(f"{name} is {low} to 10, got {getattr(self, name)}")


@cache
def _digits() -> Tensor:
    return load_images("digits").x


def picture_of(models: Models, name: str, upload: Path | None, example: int) -> Tensor:
    """Return the true picture ``[C, H, W]``: one that was uploaded, else a scan of the digits.

    Raises:
        FewstepError: what was uploaded is no picture of the model's size, or there is none and the model makes no digits.
    """
    shape = picture_shape(models.open(name))
    if upload is not None:
        return read_image(upload, shape, f"the pictures of {name} are")
    scans = _digits()
    if tuple(scans.shape[1:]) != shape:
        raise FewstepError(f"{name} makes pictures of {shape[1]} x {shape[2]} (height x width): choose one of this size")
    if not 0 <= example < len(scans):
        raise FewstepError(f"the digits have scans 0 to {len(scans) - 1}, got {example}")
    return scans[example]


def uploaded(out: Path, file: Any) -> Path | None:  # noqa: ANN401 - from a browser
    """Return the file of an upload; None without one.

    Raises:
        FewstepError: it does not lie below the page's folder, where uploads are put.
    """
    if not file:
        return None
    path = Path(str(file)).resolve()
    if not path.is_relative_to(out.resolve()):
        raise FewstepError("that is no upload: choose a picture again")
    return path


def mask_of(painted: str, height: int, width: int) -> Tensor:
    """Return what was painted, ``[H, W]``, true where the picture is to be filled in.

    Args:
        painted: a letter for each pixel in reading order, 1 where it was.
        height, width: of the picture.

    Raises:
        FewstepError: it is of another size, nothing was painted, or all of it.
    """
    if not isinstance(painted, str) or len(painted) != height * width or set(painted) - {"0", "1"}:
        raise FewstepError("the mask is of another picture: paint it again")
    mask = torch.tensor([letter == "1" for letter in painted]).reshape(height, width)
    if not bool(mask.any()) or bool(mask.all()):
        raise FewstepError("paint the pixels to be filled in" if not bool(mask.any()) else "all is painted: leave some of the picture")
    return mask


def begin_restore(shop: Workshop, asked: RestoreRequest, x0: Tensor) -> str:
    """Measure a picture, begin its restoration in the background, and return the name of the job.

    What is measured is a file of 256 grey values: noise beyond black and white is cut.

    Args:
        shop: the page's.
        asked: what happens to it.
        x0: the picture ``[C, H, W]``.

    Raises:
        FewstepError: no mask where one is needed, a measurement that the picture's size does not allow.
    """
    task, spec = WAYS[asked.way]
    shape, size = tuple(x0.shape), _odd(asked.sd, x0)
    if task == "inpaint" and asked.mask is None:
        raise FewstepError("paint the pixels to be filled in")
    y = x0 if not spec else make_task(spec.format(sd=asked.sd, size=size, noise=asked.noise), shape).measure(x0[None], [asked.seed])[0]
    folder = shop.jobs.new("restore")
    place = shop.out / ".page" / folder.name
    _save(x0, place / TRUE)
    _save(y, place / MEASURED)
    beside: list[Any] = ["--noise", asked.noise]
    if asked.mask is not None and task == "inpaint":
        _save(asked.mask[None].float() * 2 - 1, place / MASK)
        beside = ["--mask", place / MASK]
    elif task == "deblur":
        write_whole(place / KERNEL, lambda temporary: _write_array(temporary, gaussian_kernel(size, asked.sd).numpy()))
        beside += ["--kernel", place / KERNEL]
    elif task == "upscale":
        beside += ["--factor", 2]
    name, *trust = shop.models.words(asked.model)
    numbers = ["--nfe", asked.nfe, "-n", asked.num, "--seed", asked.seed]
    return shop.jobs.begin(folder, "restore", name, place / MEASURED, "--task", task, *beside, *numbers, *trust)


def _odd(sd: float, x0: Tensor) -> int:
    """Return the side of a Gaussian's kernel: two deviations on either side, as far as the picture goes, odd."""
    most = min(x0.shape[1:])
    return min(2 * math.ceil(2 * sd) + 1, most - 1 + most % 2)


def _write_array(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, values)


def _save(x0: Tensor, path: Path) -> None:
    """Write an image ``[C, H, W]`` as a PNG of its own size."""
    write_whole(path, lambda temporary: Image.fromarray(to_uint8(x0[None])[0]).save(temporary, format="PNG"))


def shown_of(shop: Workshop, job: str) -> str:
    """Return the true picture, what was measured, the mean, the uncertainty and the samples of a restoration; empty while there are none.

    Raises:
        ArtifactError: its files are damaged.
    """
    folder, place = shop.jobs.folder(job), shop.out / ".page" / job
    if not (folder / "restoration.json").exists():
        return ""
    made = Restoration.load(folder)
    truth = read_image(place / TRUE, made.mean.shape)
    spread = made.spread.mean(0, keepdim=True).expand_as(made.mean)
    grey = 2 * spread / spread.max().clamp_min(torch.finfo(spread.dtype).tiny) - 1
    unit = "times the noise" if made.card.get("noise") else "of the range"
    found = [
        Strip("true picture", "", truth[None]),
        Strip("measured", "", made.y[None]),
        Strip("mean", f"RMSE {rmse(made.mean[None], truth[None]):.3f}", made.mean[None]),
        Strip("uncertainty", f"white is {float(spread.max()):.2g}", grey[None]),
    ]
    samples = Strip("samples", f"misfit {float(made.misfit.mean()):.3g}\n{unit}", made.samples)
    note = "Where the samples differ, the measurement does not say what was there."
    return f'{tiles(found)}{strips([samples])}<p class="fs-note">{note}</p>'


# -- the tab ------------------------------------------------------------------------------------------------------------


def canvas_of(models: Models, name: str, x0: Tensor) -> dict[str, Any]:
    """Return the value of the canvas: a picture, its size, and a mask of which nothing is painted."""
    _, height, width = picture_shape(models.open(name))
    if max(height, width) > SIDE:
        raise FewstepError(f"pictures of up to {SIDE} x {SIDE} can be painted on here, and {name} makes {height} x {width}: use --mask")
    uri = plots.data_uri(plots.strip(x0[None], 1), "image/png")
    return {"picture": uri, "width": width, "height": height, "mask": "0" * (height * width)}


def tab(shop: Workshop, page: gr.Blocks) -> None:
    """Lay the tab out."""
    models = shop.models
    names = [name for name in models.names if _can(models, name)]
    script = (files("fewstep.apps.page") / "paint.js").read_text(encoding="utf-8")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="fs-controls"):
            model = gr.Dropdown(names, value=names[0] if names else None, label="Model")
            with gr.Row():
                upload = gr.UploadButton("Upload", file_types=["image"], type="filepath", min_width=110)
                example = gr.Number(7, label="or a digit, 0 to 1796", precision=0, minimum=0, min_width=90)
            way = gr.Dropdown(list(WAYS), value=HOLE, label="What happened to it")
            painted = gr.HTML({}, html_template='<canvas class="fs-canvas"></canvas>', js_on_load=script)
            with gr.Row(visible=False) as blur:
                sd = gr.Number(1.2, label="Blur, pixels", step=0.1, minimum=0.1, min_width=80)
            noise = gr.Number(0.05, label="Noise, of pixels in [-1, 1]", step=0.05, minimum=0, visible=False)
            with gr.Row():
                num = gr.Number(8, label="Samples", precision=0, minimum=1, maximum=MOST_SAMPLES, min_width=80)
                nfe = gr.Number(10, label="Evaluations", precision=0, minimum=1, maximum=MOST_NFE, min_width=80)
            go = gr.Button("Restore", variant="primary")
        with gr.Column(scale=3, min_width=320):
            note = gr.HTML('<p class="fs-note">Paint the pixels to be filled in, or choose what happened to the picture.</p>')
            running = Running(shop, "restore")
            found = gr.HTML("", elem_classes="fs-out")

    def read(name: Any, file: Any, scan: Any) -> list[Any]:  # noqa: ANN401 - from a browser
        try:
            x0 = picture_of(models, str(name), uploaded(shop.out, file), whole_of(scan))
            return [canvas_of(models, str(name), x0), ""]
        except (FewstepError, OSError) as error:
            return [{}, refused(error)]

    def fields_of(kind: str) -> list[Any]:
        return [gr.update(visible=shown) for shown in (kind == HOLE, kind == "blurred", kind != HOLE)]

    def begin(name: str, file: Any, scan: Any, kind: str, value: Any, width: float, level: float, many: Any, count: Any) -> str:  # noqa: ANN401
        x0 = picture_of(models, name, uploaded(shop.out, file), whole_of(scan))
        mask = mask_of(value.get("mask", "") if isinstance(value, dict) else "", *x0.shape[1:]) if kind == HOLE else None
        return begin_restore(shop, RestoreRequest(name, kind, mask, width, level, whole_of(many), whole_of(count)), x0)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (model.change, upload.upload, example.change):
        event(read, [model, upload, example], [painted, note], **quiet)
    page.load(read, [model, upload, example], [painted, note], **quiet)
    way.change(fields_of, way, [painted, blur, noise], **quiet)
    fields = [model, upload, example, way, painted, sd, noise, num, nfe]
    running.connect(page, go, fields, begin, [found], lambda job: [shown_of(shop, job)])


def _can(models: Models, name: str) -> bool:
    """Return whether a model can restore pictures: a student has no trajectory to correct."""
    try:
        model: Model = models.open(name)
        picture_shape(model)
    except FewstepError:
        return False
    return model.flow_map is None and model.domain is None and (model.tuned is None or model.tuned.solver is None)
