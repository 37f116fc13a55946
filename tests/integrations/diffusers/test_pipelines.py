"""Whole pipelines of diffusers: with a `FewstepScheduler` they give what `fewstep.sample` gives of `fewstep.from_pipeline`."""

import copy
import functools
import threading

import diffusers
import pytest
import torch
from tests.integrations.diffusers import tiny_pipelines

import fewstep
from fewstep import Model, ModelError, load_model, make_solver
from fewstep.core.tableau import tabulate
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.integrations.diffusers.pipeline_folders import load_pipeline
from fewstep.integrations.diffusers.pipelines import from_pipeline, read_prompts
from fewstep.models.formats.diffusers_law import noise_law

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
    pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning"),  # diffusers' own SDXL calls what it has deprecated
]
SAME = 1e-5  # of the spread of the latents: float32 networks on batches put together in another order
PROMPTS = ["a red cat", "a blue square on the moon"]
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NAMES = [name for name in tiny_pipelines.MAKERS if name != "sd-inpaint"]
FLOWS = ("sd3", "flux")


opened = functools.cache(tiny_pipelines.load)


def loaded(place, **options):
    """A pipeline whose scheduler is ours; in the v prediction, so that latents of random networks stay of size 1."""
    dtype = options.pop("dtype", torch.float32)
    pipe = copy.deepcopy(opened(place)).to(dtype)
    if place.name not in FLOWS:
        options["prediction_type"] = "v_prediction"
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def model_of(pipe, name, guidance=5.0):
    if name == "dit":
        return from_pipeline(pipe, guidance_scale=guidance)
    extra = {"height": 16, "width": 16} if name == "flux" else {"control_image": PICTURES[:1]} if name == "sd-controlnet" else {}
    return from_pipeline(pipe, PROMPTS, guidance_scale=1.0 if name == "flux" else guidance, **extra)


def noise(shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def latents_of(pipe, name, start, steps=5, guidance=5.0, **more):
    """What the loop of a pipeline ends with."""
    ask = {"num_inference_steps": steps, "output_type": "latent", **more}
    if name == "dit":  # has no latents of its own in its call: they are those of a generator, and are seen by its scheduler
        seen, step = [], pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: seen.append(step(*args, **kwargs)) or seen[-1]
        try:
            pipe(
                class_labels=[0, 1],
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
                num_inference_steps=steps,
            )
        finally:
            del pipe.scheduler.step
        return seen[-1].prev_sample[:2]
    if name == "sd-controlnet":
        ask["image"] = PICTURES[:1].expand(2, -1, -1, -1)
    ask |= {"height": 16, "width": 16} if name == "flux" else {"guidance_scale": guidance}
    return pipe(prompt=PROMPTS, latents=start.to(pipe.dtype).clone(), **ask).images


def distance(one, two):
    return float((one.float() - two.float()).abs().max() / two.float().std())


# -- the same latents -----------------------------------------------------------------------------------------------------------------


SAMPLED = [("unipc-3", None), ("heun", "uniform"), ("dpm-solver-pp-2m", "angle"), ("dpm-solver-2s", None)]


@pytest.mark.parametrize(
    ("name", "solver", "grid"),
    [
        pytest.param(name, *how, marks=[pytest.mark.slow] if how in SAMPLED[2:] and name not in ("sd", "flux") else [])
        for name in NAMES
        for how in SAMPLED
    ],
)
@pytest.mark.every(8, 2)
def test_latents_are_those_of_sample(name, solver, grid, folder):
    pipe = loaded(folder(name), solver=solver, grid=grid)
    model = model_of(pipe, name)
    start = noise(model.shape)
    ours = latents_of(pipe, name, start)
    with torch.no_grad():
        expected = fewstep.sample(model, pipe.scheduler._sampler, start, cond=torch.tensor([0, 1]))
    assert bool(expected.isfinite().all()) and distance(ours, expected) < SAME
    assert solver != "unipc-3" or distance(latents_of(pipe, name, start), ours) == 0  # again


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.every(6)
def test_bfloat16(name, folder):
    """The network rounds, the state does not: not much further from float32 than the network's own answers are."""
    pipe = loaded(folder(name), dtype=torch.bfloat16)
    model = model_of(pipe, name, guidance=1.5)
    start = noise(model.shape).bfloat16()
    x0 = model(start.float(), torch.tensor(pipe.scheduler._law.schedule.t_max, dtype=torch.float64), torch.tensor([0, 1]))
    assert x0.dtype == torch.float32
    half, full = (latents_of(one, name, start.to(one.dtype), 3, 1.5) for one in (pipe, loaded(folder(name))))
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all()) and distance(half, full) < 0.3
    assert torch.equal(latents_of(pipe, name, start, 3, 1.5), half)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dit"])  # which has no callbacks
@pytest.mark.every(3)
def test_callbacks_that_edit_latents(name, folder):
    def edit(how):
        def callback(pipe, i, t, tensors):
            if i == 2:
                tensors["latents"] = tensors["latents"].mul_(0.5) if how == "in place" else 0.5 * tensors["latents"]
            return tensors

        return callback

    pipe = loaded(folder(name), solver="dpm-solver-pp-2m")
    start = noise(model_of(pipe, name).shape)
    plain = latents_of(pipe, name, start, 4)
    replaced, written = (latents_of(pipe, name, start, 4, callback_on_step_end=edit(how)) for how in ("replace", "in place"))
    assert torch.equal(replaced, written) and distance(replaced, plain) > 0.01
    assert torch.equal(latents_of(pipe, name, start, 4), plain)


@pytest.mark.slow
def test_pipelines_inside_and_beside_each_other(folder):
    """One in the callback of another, with a scheduler of its own; and both in threads."""
    pipes = [loaded(folder("sd"), solver="unipc-3"), loaded(folder("sdxl"), solver="unipc-3")]
    starts = [noise((4, 8, 8), seed) for seed in (1, 2)]
    alone = [latents_of(pipe, "", start) for pipe, start in zip(pipes, starts, strict=True)]
    within = []

    def callback(pipe, i, t, tensors):
        within.append(latents_of(pipes[1], "", starts[1]))
        return tensors

    assert torch.equal(latents_of(pipes[0], "", starts[0], callback_on_step_end=callback), alone[0])
    assert all(torch.equal(x, alone[1]) for x in within) and len(within) == 5
    ends = {}
    threads = [threading.Thread(target=lambda k=k: ends.update({k: latents_of(pipes[k], "", starts[k])})) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(ends[0], alone[0]) and torch.equal(ends[1], alone[1])


def test_unconditional():
    model = load_model("digits-ddpm")
    pipe = load_pipeline(str(model.folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="unipc-3", grid="angle")
    ours = pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    plain = from_pipeline(pipe)
    with torch.no_grad():
        expected = fewstep.sample(plain, pipe.scheduler._sampler, noise(plain.shape))
    torch.testing.assert_close(torch.as_tensor(ours), (expected / 2 + 0.5).clamp(0, 1).movedim(1, -1), rtol=0, atol=1e-5)
    assert plain.classes is None and plain.shape == model.shape


@pytest.mark.parametrize("solver", ["unipc-3", "heun", "dpm-solver-pp-2m"])
@pytest.mark.every(3)
def test_image_to_image_is_the_solver_on_the_rest_of_the_grid(solver, folder):
    pipe = loaded(folder("sd"), solver=solver)
    model = model_of(pipe, "sd")
    variation, started = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), []
    variation.set_progress_bar_config(disable=True)
    add = pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda *args: started.append(add(*args)) or started[-1]
    ask = {"image": PICTURES, "strength": 0.6, "num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}
    ours, again = (variation(prompt=PROMPTS, **ask, generator=torch.Generator().manual_seed(0)).images for _ in range(2))
    assert torch.equal(ours, again)
    grid = fewstep.TimeGrid(pipe.scheduler._sampler.grid.t[-7:])  # six steps
    tableau = tabulate(make_solver(solver), make_solver(solver).nodes(grid, model.schedule))
    with torch.no_grad():
        assert distance(ours, fewstep.sample(model, tableau, started[-1], cond=torch.tensor([0, 1]))) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["unipc-2", "dpm-solver-pp-2m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inpainting_with_any_network(dtype, solver, folder):
    pipe = loaded(folder("sd"), dtype=dtype, solver=solver)
    painter = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    painter.set_progress_bar_config(disable=True)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    ask = {"image": PICTURES, "mask_image": mask, "num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    ends = [painter(prompt=PROMPTS, **ask, strength=1.0, generator=torch.Generator().manual_seed(0)).images for _ in range(2)]
    assert torch.equal(*ends) and bool(ends[0].isfinite().all()) and ends[0].dtype == dtype
    other = painter(prompt=PROMPTS[::-1], **ask, strength=1.0, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(other[..., :4], ends[0][..., :4]) and not torch.equal(other[..., 4:], ends[0][..., 4:])  # known, painted


@pytest.mark.slow
def test_inpainting_networks_want_a_hand_made_denoiser(folder):
    pipe = loaded(folder("sd-inpaint"), solver="unipc-3")
    with pytest.raises(ModelError, match="takes 9 channels, of which 4 are the state .*pass calls="):
        from_pipeline(pipe, PROMPTS)
    mask, calls = torch.zeros(2, 1, 16, 16), []
    mask[..., 8:] = 1
    hook = pipe.unet.register_forward_pre_hook(
        lambda net, args, kwargs: calls.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    start = noise((4, 8, 8))
    ours = latents_of(pipe, "", start, image=PICTURES, mask_image=mask, strength=1.0)
    hook.remove()
    others, embeds = calls[0][0][:, 4:], calls[0][1]

    def network(x, time):
        output = pipe.unet(torch.cat([torch.cat([x, x]), others], 1), time[:1], encoder_hidden_states=embeds).sample
        null, wanted = output.chunk(2)
        return null + 5.0 * (wanted - null)

    law = noise_law(pipe.scheduler.config, to_clean=True)
    with torch.no_grad():
        expected = fewstep.sample(Model(network, law.schedule, law.prediction, time=law.time), pipe.scheduler._sampler, start)
    assert distance(ours, expected) < SAME


# -- from_pipeline --------------------------------------------------------------------------------------------------------------------


def test_prompts_of_every_kind(folder, tmp_path):
    pipe = loaded(folder("sd"))
    one, several = from_pipeline(pipe, "a red cat"), from_pipeline(pipe, PROMPTS)
    (tmp_path / "prompts.txt").write_text("\n  a red cat \n\n\ta blue square on the moon\n\n", encoding="utf-8")
    file = from_pipeline(pipe, tmp_path / "prompts.txt")
    assert one.prompts == ("a red cat",) and (one.classes, one.null_label) == (1, 1)
    assert file.prompts == several.prompts == tuple(PROMPTS) and file.fingerprint == several.fingerprint != one.fingerprint
    x, t = noise(one.shape), torch.tensor(500.0, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(several(x, t), several(x, t, torch.tensor([0, 1])))  # the prompts in turn
        torch.testing.assert_close(one(x, t)[:1], several(x, t)[:1])
    (tmp_path / "unicode.txt").write_text("der Mond über dem Fluß\n月の猫\n", encoding="utf-8")
    assert read_prompts(tmp_path / "unicode.txt") == ["der Mond über dem Fluß", "月の猫"]
    many = from_pipeline(pipe, ["a red cat"] * 40)  # encoded in parts
    with torch.no_grad():
        torch.testing.assert_close(many(x, t, torch.tensor([0, 39])), one(x, t))


def test_what_the_fingerprint_knows(folder):
    pipe = loaded(folder("sd"))
    first = from_pipeline(pipe, PROMPTS).fingerprint
    assert first == from_pipeline(loaded(folder("sd")), PROMPTS).fingerprint
    assert (
        len({first, from_pipeline(pipe, PROMPTS[::-1]).fingerprint, from_pipeline(pipe, PROMPTS, negative_prompt="moon").fingerprint}) == 3
    )
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.01)
    assert from_pipeline(pipe, PROMPTS).fingerprint != first


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_negative_prompts_and_sizes(name, folder):
    pipe = loaded(folder(name), solver="ddim")
    model = from_pipeline(pipe, PROMPTS, negative_prompt="small circle", guidance_scale=3.0, height=24, width=16)
    assert model.shape == (4, 12, 8)
    start = noise(model.shape)
    ours = latents_of(pipe, "", start, 2, 3.0, negative_prompt=["small circle"] * 2, height=24, width=16)
    with torch.no_grad():
        expected = fewstep.sample(model, pipe.scheduler._sampler, start)
    assert distance(ours, expected) < SAME < 1e-3 < distance(latents_of(pipe, "", start, 2, 3.0, height=24, width=16), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.every(2)
def test_gradients_and_devices(name, folder):
    model = model_of(loaded(folder(name)), name)
    x = noise(model.shape).requires_grad_()
    t = torch.tensor(0.5 if name in FLOWS else 500.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(model(x, t, torch.tensor([0, 1])).square().sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
    model.network.to("meta")
    assert {value.device.type for value in model.network.state_dict().values()} == {"meta"}  # the conditions too


VARIANTS = {
    "sd": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.every(2)
def test_pipelines_of_a_family_are_one_model(name, folder):
    pipe = loaded(folder(name))
    expected = model_of(pipe, name)
    for kind in VARIANTS[name]:
        other = model_of(getattr(diffusers, kind)(**pipe.components), name)
        assert (other.fingerprint, other.shape, other.classes) == (expected.fingerprint, expected.shape, expected.classes), kind


@pytest.mark.parametrize(
    ("name", "part", "option", "says"),
    [
        ("sd", "unet", {"time_cond_proj_dim": 8}, "an embedding of the guidance scale, as LCM's does"),
        ("sd", "unet", {"encoder_hid_dim_type": "ip_image_proj"}, "embeddings of a picture, as an IP-adapter's does"),
        ("sd", "unet", {"num_class_embeds": 8}, "takes class labels .*num_class_embeds"),
        ("sdxl", None, {"requires_aesthetics_score": True}, "takes an aesthetic score"),
        ("flux", "transformer", {"in_channels": 32}, "takes 32 channels, of which 16 are the state"),
    ],
)
def test_a_network_that_takes_more_than_prompts_is_refused(name, part, option, says, folder):
    pipe = loaded(folder(name))
    (pipe if part is None else getattr(pipe, part)).register_to_config(**option)
    with pytest.raises(ModelError, match=f"this network takes? ?.*{says.removeprefix('takes ')}"):
        model_of(pipe, name)


def test_the_guidance_that_a_network_is_given_is_a_part_of_the_model(folder):
    pipe = loaded(folder("flux"))
    one, other = (from_pipeline(pipe, PROMPTS, height=16, width=16, embedded_guidance=scale) for scale in (3.5, 7.0))
    x, t = noise(one.shape), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        assert one.fingerprint != other.fingerprint and not torch.allclose(one(x, t), other(x, t))


def test_the_users_network_is_left_as_it_is(folder):
    pipe = loaded(folder("sd"))
    pipe.unet.train().requires_grad_(True)
    model = from_pipeline(pipe, PROMPTS)
    assert pipe.unet.training and all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert fewstep.sample(model, "ddim", nfe=1, seeds=[1]).isfinite().all()  # no dropout: nothing depends on the mode
    pipe.unet.down_blocks[0].resnets[0].dropout.p = 0.5
    with pytest.raises(ModelError, match="has a Dropout in training mode"):
        fewstep.sample(model, "ddim", nfe=1, seeds=[1])


@pytest.mark.slow  # for what is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_is_the_same_model(folder):
    pipe = loaded(folder("sd"))
    before = from_pipeline(pipe, PROMPTS)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    after = from_pipeline(pipe, PROMPTS)
    assert after.fingerprint == before.fingerprint
    ends = [fewstep.sample(model, "ddim", nfe=2, seeds=[1]) for model in (before, after)]
    assert distance(*ends) < SAME


@pytest.mark.slow
def test_pipelines_that_are_not_known(folder, tmp_path):
    sd, dit, flux = loaded(folder("sd")), loaded(folder("dit")), loaded(folder("flux"))
    unconditional = load_pipeline(load_model("digits-ddpm").folder)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for ask, message in (
        (lambda: from_pipeline(sd), "needs prompts: pass one"),
        (lambda: from_pipeline(flux), "needs prompts: pass one"),
        (lambda: from_pipeline(sd, []), "needs prompts"),
        (lambda: from_pipeline(dit, PROMPTS), "takes no prompts"),
        (lambda: from_pipeline(unconditional, PROMPTS), "takes no prompts"),
        (lambda: from_pipeline(unconditional, guidance_scale=2.0)(noise((1, 8, 8)), torch.tensor(5.0)), "cannot be guided"),
        (lambda: from_pipeline(sd, tmp_path / "none.txt"), "cannot read the prompts in .*none.txt"),
        (lambda: from_pipeline(sd, tmp_path / "empty.txt"), "has no prompts: write one on each line"),
        (lambda: from_pipeline(sd, tmp_path / "binary.txt"), "it should be a text file"),
        (lambda: from_pipeline(loaded(folder("sd-controlnet")), PROMPTS), "needs control_image"),
        (lambda: from_pipeline(torch.nn.Linear(1, 1), PROMPTS), "a Linear is no diffusers pipeline"),
    ):
        with pytest.raises(fewstep.FewstepError, match=message):
            ask()
