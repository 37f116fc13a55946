"""A pipeline as a model by its own calls: the same latents, whatever the pipeline adds, and nothing left behind."""

import gc
import json
import threading

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests.apps.conftest import run as command
from tests.integrations.diffusers.tiny_pipelines import load

import fewstep
from fewstep import FewstepError, FitConfig, ModelError, from_pipeline
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.integrations.diffusers.pipeline_calls import _remembering, read_calls
from fewstep.integrations.diffusers.relay import Relay

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
SIZE = {"height": 16, "width": 16}
EMBEDS = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(3))
CALLS = {
    "sd": [{"prompt": "a red cat", "guidance_scale": 5.0, **SIZE}, {"prompt": "the moon", "negative_prompt": "a small cat", **SIZE}],
    "sd-inpaint": [{"prompt": "a cat", "image": PICTURE, "mask_image": MASK, "strength": 1.0, **SIZE}],
    "sd-controlnet": [{"prompt": "a cat", "image": PICTURE, "guidance_scale": 3.0}, {"prompt": "the moon", "image": PICTURE}],
    "sdxl": [{"prompt": "a cat", "prompt_2": "on the moon", **SIZE}, {"prompt": "a red square", "guidance_scale": 2.0, **SIZE}],
    "sd3": [{"prompt": "a cat", **SIZE}, {"prompt": "a blue circle", "guidance_scale": 3.0, **SIZE}],
    "flux": [
        {"prompt": "a cat", "guidance_scale": 2.0, **SIZE},
        {"prompt": "a cat", "true_cfg_scale": 2.0, "negative_prompt": "red", **SIZE},
    ],
    "dit": [{"class_labels": [1]}, {"class_labels": [0], "guidance_scale": 2.0}],
    "cogview4": [{"prompt_embeds": EMBEDS, "negative_prompt_embeds": 0 * EMBEDS, **SIZE}],
}


def own(pipe, call, solver, steps=4):
    """The latents of the pipeline itself with our scheduler in it, and the sampler that it ran."""
    usual, pipe.scheduler = pipe.scheduler, FewstepScheduler.from_config(pipe.scheduler.config, solver=solver, timestep_spacing="trailing")
    with torch.no_grad():
        made = pipe(**call, num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(0))[0]
    scheduler, pipe.scheduler = pipe.scheduler, usual
    return made, scheduler._sampler


@pytest.fixture
def no_threads():
    before = threading.active_count()
    yield
    assert threading.active_count() <= before + 1  # of progress bars


@pytest.mark.parametrize("name", [name for name in CALLS if name != "dit"])
@pytest.mark.parametrize("solver", ["ddim", "unipc-2"])
@pytest.mark.every(5, 2)
def test_samples_are_the_pipelines_own(name, solver, folder):
    pipe = load(folder(name))
    model = from_pipeline(pipe, calls=CALLS[name])
    for label, call in enumerate(CALLS[name]):
        theirs, sampler = own(pipe, call, solver)
        relay, first = model.network._begun(label, 1, 4)
        relay.close()
        ours = fewstep.sample(model, sampler, first.x, torch.tensor([label]))
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    model.network.close()


def test_a_pipeline_that_keeps_both_halves_of_its_guidance(folder):
    pipe = load(folder("dit"))
    model, plain = from_pipeline(pipe, calls=CALLS["dit"]), from_pipeline(pipe)
    for label, (words, scale) in enumerate(((1, 4.0), (0, 2.0))):
        ours = fewstep.sample(model, "unipc-2", nfe=4, seeds=range(3), cond=torch.full((3,), label))
        theirs = fewstep.sample(plain, "unipc-2", nfe=4, seeds=range(3), cond=torch.full((3,), words), guidance=scale)
        assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.slow
def test_calls_and_batches_are_mixed_at_will(folder):
    pipe = load(folder("sd"))
    model = from_pipeline(pipe, calls=CALLS["sd"])
    whole = fewstep.sample(model, "unipc-2", nfe=3, seeds=range(11))
    for seed in (0, 5, 10):
        alone = fewstep.sample(model, "unipc-2", nfe=3, seeds=[seed])
        torch.testing.assert_close(alone[0], whole[seed], rtol=1e-4, atol=1e-4)
    assert len(model.network._open) <= 4
    many = fewstep.sample(model, "unipc-2", nfe=80, seeds=[0])  # longer than one call
    assert bool(many.isfinite().all())


@pytest.mark.usefixtures("no_threads")
def test_nothing_is_left_behind(folder):
    pipe = load(folder("sd"))
    before, words = dict(vars(pipe)), pipe.encode_prompt
    model = from_pipeline(pipe, calls=CALLS["sd"])
    fewstep.sample(model, "unipc-2", nfe=3, seeds=range(4))
    model.network.close()
    assert dict(vars(pipe)) == before and pipe.encode_prompt == words and not hasattr(pipe.scheduler, "_relay")


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.every(2)
def test_an_error_on_the_pipelines_side_ends_both(error, folder):
    pipe = load(folder("sd"))
    model, forward, calls = from_pipeline(pipe, calls=CALLS["sd"][:1]), pipe.unet.forward, []
    before = dict(vars(pipe))

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise error("now")
        return forward(*args, **options)

    pipe.unet.forward = failing
    with pytest.raises((error, ModelError), match="now"):
        fewstep.sample(model, "unipc-2", nfe=5, seeds=[0])
    pipe.unet.forward = forward
    assert dict(vars(pipe)) == before
    assert bool(fewstep.sample(model, "unipc-2", nfe=5, seeds=[0]).isfinite().all())  # and the next begins anew
    model.network.close()


@pytest.mark.usefixtures("no_threads")
def test_an_interrupt_on_the_learners_side_ends_both(folder, monkeypatch):
    pipe = load(folder("sd"))
    model = from_pipeline(pipe, calls=CALLS["sd"][:1])
    relay = model.network._relay(0, 1)
    monkeypatch.setattr(
        relay, "_told", type("Told", (), {"get": lambda self: (_ for _ in ()).throw(KeyboardInterrupt), "put": lambda *_: None})()
    )
    with pytest.raises(KeyboardInterrupt):
        relay.ask(torch.zeros(1, *model.shape), 500.0)
    assert relay.ended and not relay._thread.is_alive() and not hasattr(pipe.scheduler, "_relay")
    monkeypatch.undo()
    assert bool(fewstep.sample(model, "ddim", nfe=2, seeds=[0]).isfinite().all())
    model.network.close()


@pytest.mark.slow
@pytest.mark.usefixtures("no_threads")
def test_calls_that_wait_end_with_their_model(folder):
    model = from_pipeline(load(folder("sd")), calls=CALLS["sd"])
    fewstep.sample(model, "ddim", nfe=2, seeds=range(4))
    waiting = [relay._thread for relay in model.network._open.values()]
    assert waiting and all(thread.is_alive() for thread in waiting)
    del model
    gc.collect()
    assert not any(thread.is_alive() for thread in waiting)


def test_encodings_of_tensors_and_pictures_are_not_kept():
    kept, asked = {}, []
    encode = _remembering(lambda *args, **options: asked.append(1) or len(asked), kept)
    one, two = torch.zeros(2000), torch.zeros(2000)
    two[1000] = 1  # which the text of a tensor leaves out
    assert [encode(["a cat"], device=torch.device("cpu"), embeds=[value]) for value in (one, two)] == [1, 2]
    assert [encode(["a cat"], device=torch.device("cpu"), embeds=None) for _ in range(2)] == [3, 3]


@pytest.mark.slow
def test_text_encoders_answer_once(folder):
    pipe, count = load(folder("sd")), []
    pipe.text_encoder.register_forward_hook(lambda *_: count.append(1))
    model = from_pipeline(pipe, calls=CALLS["sd"][:1])
    fewstep.sample(model, "ddim", nfe=150, grid="uniform", seeds=[0])
    assert len(count) == 2  # the prompt and the empty one


@pytest.mark.slow
def test_a_fitted_sampler_runs_in_the_pipeline(folder, tmp_path):
    pipe = load(folder("sd"))
    model = from_pipeline(pipe, calls=CALLS["sd"])
    small = FitConfig(num=16, held_out=8, noises=8, levels=8, iterations=1, batch=8)
    fewstep.fit(model, 3, config=small, out=tmp_path / "fitted")
    start = fewstep.seeded_noise([5], model.shape)
    sampler = fewstep.Sampler.load(tmp_path / "fitted" / "nfe-03")
    ours = fewstep.sample(model, sampler, start, torch.tensor([1]))
    pipe.scheduler = FewstepScheduler.from_sampler(tmp_path / "fitted", pipe.scheduler.config)
    theirs = pipe(**CALLS["sd"][1], latents=start, num_inference_steps=3, output_type="latent").images
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


REFUSED = {
    "no list": ("a red cat", "calls are the arguments of the pipeline"),
    "none": ([], "calls are the arguments of the pipeline"),
    "no dict": (["a red cat"], "call 0 is a dict of arguments"),
    "an unknown argument": ([{"prompts": "a cat"}], "call 0 has the argument 'prompts', which a StableDiffusionPipeline does not know"),
    "steps": ([{"prompt": "a cat", "num_inference_steps": 5}], "call 0 says num_inference_steps"),
    "latents": ([{"prompt": "a cat", "latents": torch.zeros(1)}], "the states are the learner's"),
    "a generator": ([{"prompt": "a cat", "generator": torch.Generator()}], "say seed, a whole number"),
    "what the pipeline refuses": ([{"prompt": 5}], "a StableDiffusionPipeline refused call 0: ValueError: `prompt` has to be"),
    "two sizes": ([{"prompt": "a cat", **SIZE}, {"prompt": "a cat", "height": 32, "width": 16}], "one noise law and one size"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.every(3)
def test_calls_that_cannot_be_are_refused(kind, folder):
    calls, says = REFUSED[kind]
    with pytest.raises(FewstepError, match=says):
        fewstep.sample(from_pipeline(load(folder("sd")), calls=calls), "ddim", nfe=2, seeds=range(2))


def test_prompts_lead_pipelines_whose_network_is_not_known(folder):
    pipe = load(folder("sd"))
    other = type("MyPipeline", (type(pipe),), {})(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ModelError, match=r"a MyPipeline is led by its own calls: pass calls="):
        from_pipeline(other)
    ours = from_pipeline(other, ["a cat", "the moon"], guidance_scale=3.0, negative_prompt="red", **SIZE)
    direct = from_pipeline(pipe, ["a cat", "the moon"], guidance_scale=3.0, negative_prompt="red", **SIZE)
    one, two = (fewstep.sample(model, "unipc-2", nfe=3, seeds=range(4)) for model in (ours, direct))
    assert ours.prompts == direct.prompts and ours.default_guidance == 1 and float((one - two).abs().max()) < 1e-4 * float(two.abs().max())


def test_the_pipelines_own_start_is_what_it_begins_with(folder):
    pipe = load(folder("sd"))
    model = from_pipeline(pipe, calls=[{**CALLS["sd"][0], "seed": 3}, CALLS["sd"][1]])
    starts = model.own_start([1, 0])
    for seed, start in zip((0, 3), starts, strict=True):
        assert torch.equal(start, torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(seed))[0])
    for labels, says in (([2], "0 to 1, got 2"), ([], "no labels"), ([0.5], "a label")):
        with pytest.raises(ModelError, match=says):
            model.own_start(labels)
    with pytest.raises(ModelError, match="led by its calls"):
        from_pipeline(pipe, "a cat").own_start([0])


def test_what_stands_beside_calls_is_refused(folder):
    pipe = load(folder("sd"))
    with pytest.raises(ModelError, match="put prompts, guidance_scale into them"):
        from_pipeline(pipe, "a cat", calls=CALLS["sd"], guidance_scale=3.0)


def test_guidance_that_ends_at_a_step_is_refused(folder):
    call = {**CALLS["sd-controlnet"][0], "control_guidance_end": 0.5}
    with pytest.raises(ModelError, match="answers otherwise at another step of its loop"):
        from_pipeline(load(folder("sd-controlnet")), calls=[call])


def test_what_a_step_would_have_ignored_is_refused(folder):
    with pytest.raises(FewstepError, match="'eta'.*option of the solver"):
        from_pipeline(load(folder("sd")), calls=[{**CALLS["sd"][0], "eta": 0.5}])
    clipping = load(folder("sd"))
    clipping.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(clipping.scheduler.config, thresholding=True)
    with pytest.raises(ModelError, match="clips its estimates"):
        from_pipeline(clipping, calls=CALLS["sd"])
    tokens = load(folder("ltx-condition"))
    given = {"prompt_embeds": torch.zeros(1, 4, 32), "prompt_attention_mask": torch.ones(1, 4)}
    call = given | {f"negative_{key}": value for key, value in given.items()}
    with pytest.raises(FewstepError, match="per_token_timesteps"):
        from_pipeline(tokens, calls=[{**call, "height": 32, "width": 32, "num_frames": 9}])


def test_a_start_from_a_picture_is_refused(folder):
    call = {**CALLS["sd-inpaint"][0], "strength": 0.5}
    with pytest.raises(ModelError, match=r"begins at the time .*, not at pure noise"):
        from_pipeline(load(folder("sd-inpaint")), calls=[call])


def test_a_loop_that_copies_its_times_is_refused(folder):
    pipe = load(folder("sd"))
    relay = Relay(pipe, lambda: None)
    with pytest.raises(ModelError, match="ended without evaluating its network"):
        relay.begin()

    def copying():
        pipe.scheduler.set_timesteps(4)
        x = torch.zeros(1, 4)
        for time in pipe.scheduler.timesteps.tolist():
            x = pipe.scheduler.step(x, time, x).prev_sample

    relay = Relay(pipe, copying)
    relay.begin()
    with pytest.raises(ModelError, match="copies its times before the loop"):
        relay.ask(torch.zeros(1, 4), 77.0)
    assert not relay._thread.is_alive()


@pytest.mark.slow
def test_models_of_other_calls_are_told_apart(folder):
    pipe = load(folder("sd-controlnet"))
    call = CALLS["sd-controlnet"][0]
    others = [{**call, "prompt": "a dog"}, {**call, "guidance_scale": 4.0}, {**call, "image": PICTURE.rotate(90)}, {**call, "seed": 1}]
    prints = [from_pipeline(pipe, calls=[one]).fingerprint for one in (call, dict(call), *others)]
    assert prints[0] == prints[1] and len(set(prints)) == 5
    assert from_pipeline(load(folder("sd-controlnet")), calls=[call]).fingerprint == prints[0]


# -- from files -----------------------------------------------------------------------------------------------------------


def test_calls_are_read_with_their_pictures(tmp_path):
    PICTURE.save(tmp_path / "cat.png")
    lines = [{"prompt": "a cat", "image": "cat.png", "seed": 3}, {"prompt": "the moon", "image": ["cat.png", "cat.png"], "num_images": 2}]
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    one, two = read_calls(tmp_path / "calls.jsonl")
    assert one["prompt"] == "a cat" and one["seed"] == 3 and np.array_equal(one["image"], PICTURE)
    assert len(two["image"]) == 2 and two["num_images"] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no calls"),
        ("a red cat", "calls.jsonl, line 1"),
        ('{"prompt": "a cat"}\n[1]', "calls.jsonl, line 2"),
        ('{"image": "nowhere.png"}', "nowhere.png"),
    ],
)
def test_files_that_are_no_calls_are_refused(text, says, tmp_path):
    (tmp_path / "calls.jsonl").write_text(text)
    with pytest.raises(ModelError, match=says):
        read_calls(tmp_path / "calls.jsonl")


@pytest.mark.slow
def test_the_command_line_fits_by_calls(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, CALLS["sd"])))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    small = ["--nfe", "2", "--num", "8", "--held-out", "4", "--noises", "4", "--levels", "6", "--iterations", "1"]
    words = ("fit", folder("sd"), *small, "--calls", tmp_path / "calls.jsonl", "--out", tmp_path / "fitted")
    assert command(monkeypatch, *words, "--dtype", "float32") == 0
    assert "FewstepScheduler.from_sampler" in capsys.readouterr().out
    assert (tmp_path / "fitted" / "nfe-02" / "sampler.json").is_file()
    for more, says in (
        (("--guidance", "5"), "leave --guidance out"),
        (("--prompts", tmp_path / "prompts.txt"), "give one of --prompts and --calls"),
        (("--height", "16"), "put height into them"),
        (("--dtype", "float8"), "unknown dtype of a pipeline 'float8'"),
        (("--offload", "all"), "unknown way to offload a pipeline 'all'"),
    ):
        assert command(monkeypatch, *words[:-1], tmp_path / "other", *more) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
