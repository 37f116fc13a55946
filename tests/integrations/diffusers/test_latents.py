"""Latents become the pictures that the pipeline's own call makes of them."""

from types import SimpleNamespace

import pytest
import torch
from tests.integrations.diffusers import tiny_pipelines

from fewstep import ModelError
from fewstep.integrations.diffusers.latents import decode_latents

pytestmark = pytest.mark.filterwarnings("ignore")  # of what diffusers itself has deprecated


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.every(2)
def test_pictures_are_those_of_the_pipeline(name, folder):
    pipe = tiny_pipelines.load(folder(name))
    size = {"height": 16, "width": 16} if name == "flux" else {}
    if name == "sdxl":  # as some of its kind are normalised
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 0.5, 2.0])
    ask = {"prompt": ["a red cat", "the moon"], "num_inference_steps": 2, **size}
    latents, theirs = (pipe(**ask, output_type=kind, generator=torch.Generator().manual_seed(0)).images for kind in ("latent", "pt"))
    pictures = decode_latents(pipe, latents, **size)
    assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.float32
    torch.testing.assert_close(pictures / 2 + 0.5, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_decoder_that_overflows_in_half_is_as_wide_as_in_the_pipeline(folder):
    pipe = tiny_pipelines.load(folder("sdxl"), torch_dtype=torch.float16)
    assert pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wide = tiny_pipelines.load(folder("sdxl"), torch_dtype=torch.float16)
    wide.vae.to(torch.float32)
    assert torch.equal(decode_latents(pipe, latents), decode_latents(wide, latents))
    assert pipe.vae.dtype == torch.float16  # as it was


def test_pictures_are_checked_where_the_pipeline_does(folder):
    pipe = tiny_pipelines.load(folder("sd"))
    seen = []

    def checker(images, clip_input):
        seen.append(clip_input.dtype)
        return torch.zeros_like(images), [True]

    pipe.register_modules(safety_checker=checker)
    pipe.feature_extractor = lambda images, return_tensors: SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=torch.ones(1)))
    assert not decode_latents(pipe, torch.randn(1, 4, 8, 8)).any() and seen == [torch.float32]


def test_a_pipeline_of_another_kind_is_refused():
    with pytest.raises(ModelError, match="the latents of a SimpleNamespace are not decoded here"):
        decode_latents(SimpleNamespace(vae=None), torch.zeros(1, 4, 8, 8))
