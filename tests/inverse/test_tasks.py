"""Tasks by name: what they measure, their pseudo-inverse, and what is refused."""

import pytest
import torch

from fewstep import ModelError, seeded_noise
from fewstep.inverse.tasks import TASKS, gaussian_kernel, make_task

SHAPE = (3, 16, 16)
X = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
NAMES = {
    "upscale": "upscale:factor=2:noise=0.05",
    "inpaint": "inpaint:box=8:noise=0",
    "inpaint:keep=0.3": "inpaint:keep=0.3:seed=0:noise=0.05",
    "deblur": "deblur:sd=1.2:size=5:noise=0.05",
    "denoise": "denoise:noise=0.3",
    "colorize": "colorize:noise=0",
    "clip": "clip:gain=2:noise=0.05",
}
OUTPUTS = {"upscale": (3, 8, 8), "colorize": (1, 16, 16)}


@pytest.mark.parametrize("spec", NAMES)
def test_a_name_has_all_options_and_is_the_same_task(spec: str) -> None:
    task = make_task(spec, SHAPE)
    assert task.name == NAMES[spec] and make_task(task.name, SHAPE).name == task.name
    y = task.measure(X, [4, 5])
    assert y.shape == (2, *OUTPUTS.get(spec, SHAPE))
    torch.testing.assert_close(make_task(task.name, SHAPE).measure(X[1:], [5]), y[1:])  # the noise belongs to the picture
    assert abs(float((y - task.measurement(X)).std()) - task.noise) < 0.1 * task.noise + 1e-6
    assert {name.split(":")[0] for name in NAMES} == set(TASKS)


def test_the_noise_is_none_that_a_sampler_adds() -> None:
    """Samplers that add noise take that of the same seed in streams 1, 2, ... for their steps, and start from stream 0."""
    noise = make_task("denoise:noise=1", SHAPE).measure(torch.zeros(1, *SHAPE), [3])
    for stream in range(150):
        assert abs(float((noise * seeded_noise([3], SHAPE, stream=stream)).mean())) < 0.2  # of chance it is 0.04


def test_what_is_kept_of_a_picture() -> None:
    hole = make_task("inpaint:box=4", SHAPE).measurement(torch.ones(1, *SHAPE))[0]
    assert float((1 - hole).sum()) == 3 * 16 and not hole[:, 6:10, 6:10].any()
    some = make_task("inpaint:keep=0.25:seed=1", SHAPE).measurement(torch.ones(1, *SHAPE))[0]
    assert float(some.sum()) == 3 * 64 and torch.equal(some[0], some[2])  # all colours of a pixel, or none
    assert not torch.equal(some, make_task("inpaint:keep=0.25:seed=2", SHAPE).measurement(torch.ones(1, *SHAPE))[0])
    assert make_task("inpaint", (1, 8, 8)).name == "inpaint:box=4:noise=0"


def test_a_gaussian_kernel() -> None:
    kernel = gaussian_kernel(5, 1.2)
    assert kernel.shape == (5, 5) and float(kernel.sum()) == pytest.approx(1) and torch.equal(kernel, kernel.T)
    assert float(kernel[2, 3] / kernel[2, 2]) == pytest.approx(float(torch.exp(torch.tensor(-0.5 / 1.2**2))))


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        ("blur", SHAPE, "unknown task 'blur': did you mean deblur"),
        ("upscale:by=2", SHAPE, "has no option by; it has: factor, noise"),
        ("upscale:factor=3", SHAPE, r"cannot be averaged in blocks of 3 x 3"),
        ("upscale:factor=x", SHAPE, "factor is a whole number of pixels from 1, got 'x'"),
        ("upscale:noise=-1", SHAPE, "a finite number from 0, got -1"),
        ("upscale:noise=NaN", SHAPE, "the noise of a task is a number"),
        ("upscale", (3, 16), "tasks are for pictures"),
        ("inpaint:box=20", SHAPE, "20 x 20 pixels leaves nothing of pictures of 16 x 16"),
        ("inpaint:box=16", SHAPE, "leaves nothing"),
        ("inpaint:box=0", SHAPE, "box is a whole number"),
        ("inpaint:box=4:keep=0.5", SHAPE, "a box, or all but a share"),
        ("inpaint:seed=4", SHAPE, "leave it out with a box"),
        ("inpaint:keep=1.5", SHAPE, "between 0 and 1"),
        ("inpaint:keep=0.3:seed=-1", SHAPE, "seed is a whole number from 0"),
        ("deblur:size=4", SHAPE, "odd sides"),
        ("deblur:size=17", SHAPE, "larger than pictures of 16 x 16"),
        ("deblur:sd=0", SHAPE, "a positive number, got 0"),
        ("denoise:noise=0", SHAPE, "denoise wants noise"),
        ("colorize", (1, 8, 8), "three colours, these have 1 channel"),
        ("clip:gain=0", SHAPE, "a gain that is not 0"),
        ("upscale:factor", SHAPE, "should read name:option=value"),
    ],
)
@pytest.mark.every(2)
def test_what_cannot_be_is_refused(spec: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        make_task(spec, shape)
    assert "\n" not in str(error.value)
