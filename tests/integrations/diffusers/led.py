"""What is measured of a pipeline that is led by its own calls: how far ours is from its own scheduler, and what a fit gains."""

from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from tests.integrations.diffusers import tiny_adapted, tiny_pictures, tiny_sounds, tiny_videos

import fewstep
from fewstep import FitConfig, Sampler, TimeGrid, from_pipeline
from fewstep.integrations.diffusers import FewstepScheduler

CALLS = tiny_pictures.CALLS | tiny_videos.CALLS | tiny_sounds.CALLS | tiny_adapted.CALLS
STEPS = 5
SMALL = FitConfig(num=32, held_out=16, noises=16, levels=16, iterations=1, batch=16)
ROUNDED = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")  # they round the time that the network is told, and not its level
NOISY = ("CosineDPMSolverMultistepScheduler",)  # their steps add noise: of the first order they are ddim:eta=1
REFUSED = {  # what a call asks for -> why its network is no function of the state and the time
    "guidance that ends at a step": ("z-image", {"cfg_truncation": 0.5}, "answers otherwise at another"),
    "guidance that ends at a part of the steps": ("lumina-2", {"cfg_trunc_ratio": 0.5}, "answers otherwise at another"),
    "guidance by the number of steps": ("cogvideox", {"use_dynamic_cfg": True}, "answers otherwise in a call of another number of steps"),
    "a part of the trajectory": ("flux-fill", {"strength": 0.5}, "not at pure noise"),
    "guidance with momentum": ("ace-step", {"guidance_scale": 3.0}, "answers otherwise at another.*guidance with a memory"),
}
GUIDERS = {  # of a modular pipeline, that are refused likewise
    "a guider with momentum": (
        diffusers.AdaptiveProjectedGuidance,
        {"adaptive_projected_guidance_momentum": -0.5, "adaptive_projected_guidance_rescale": 1.0},
    ),
    "a guider that ends at a step": (diffusers.ClassifierFreeGuidance, {"stop": 0.5}),
}


def last_state(pipe: Any, call: Any, scheduler: Any, steps: int = 4) -> Any:
    """The state after the last step of the pipeline's own call with a scheduler: before it is unpacked or put on another scale."""
    usual, pipe.scheduler, states = pipe.scheduler, scheduler, []
    step = scheduler.step

    @wraps(step)  # pipelines look at its arguments
    def watched(*args: Any, **options: Any) -> Any:
        answer = step(*args, **options)
        states.append(answer[0])
        return answer

    scheduler.step = watched
    kind = "pt" if "Marigold" in type(pipe).__name__ else "latent"
    with torch.no_grad():
        pipe(**call, num_inference_steps=steps, output_type=kind, generator=torch.Generator().manual_seed(0))
    pipe.scheduler = usual
    return states[-1]


def own(pipe: Any, **options: Any) -> Any:
    """The pipeline's own scheduler, at the first order where it has several."""
    return type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1, disable_corrector=[*range(50)], **options)


def apart(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def steps_apart(pipe: Any, calls: Any) -> dict[str, float]:
    """How far `ddim` is from the pipeline's own scheduler on its own times (``own``), and from itself in the pipeline (``stepped``)."""
    model = from_pipeline(pipe, calls=calls)
    law, noisy, made = model.network.law, type(pipe.scheduler).__name__ in NOISY, []
    found = {"own": 0.0, "stepped": 0.0, "together": 0.0}
    for label, call in enumerate(calls):
        if not noisy:
            theirs = own(pipe)
            expected, start = last_state(pipe, call, theirs), model.own_start([label])
            ends = law.schedule.ends
            t = law.t_of_time(theirs.timesteps.double()).clamp(ends.min(), ends.max())
            sampler = Sampler.build(fewstep.make_solver("ddim"), TimeGrid(torch.cat([t, ends.min()[None]])), law.schedule)
            ours = fewstep.sample(model, sampler, start, torch.tensor([label]))
            found["own"] = max(found["own"], apart(ours, expected))
        stepped = FewstepScheduler.from_config(pipe.scheduler.config, solver="ddim")
        expected, start = last_state(pipe, call, stepped), model.own_start([label])
        ours = fewstep.sample(model, stepped._sampler, start, torch.tensor([label]))
        found["stepped"] = max(found["stepped"], apart(ours, expected))
        three = fewstep.sample(model, stepped._sampler, start.expand(3, *start.shape[1:]), torch.full((3,), label))
        found["together"] = max(found["together"], apart(three, ours.expand_as(three)))
        made.append(ours)
    model.network.close()
    found["calls"] = apart(made[0], made[-1])
    return found


def fit_errors(pipe: Any, calls: Any, out: Path) -> dict[str, float]:
    """The errors of the pipeline's own scheduler (``own``) and of a fit in the pipeline (``fitted``) at few steps.

    The truth is its own scheduler's at 50 steps. Where that adds noise, its own error is to itself on the same path of noises, and the
    fit's to UniPC at 50 steps, since a sampler that adds none goes elsewhere. ``saved`` is how far the saved sampler is from what the
    pipeline made.
    """
    usual = type(pipe.scheduler)
    model = from_pipeline(pipe, calls=calls)
    fewstep.fit(model, STEPS, config=SMALL, out=out)

    def all_made(made: Any, steps: int) -> Any:
        return torch.cat([last_state(pipe, call, made(), steps) for call in calls])

    def theirs() -> Any:
        return usual.from_config(pipe.scheduler.config)

    def fitted() -> Any:
        return FewstepScheduler.from_sampler(out, pipe.scheduler.config)

    def smooth() -> Any:
        return FewstepScheduler.from_config(pipe.scheduler.config, solver="unipc-2")

    def rmse(one: Any, other: Any) -> float:
        return float((one - other).square().mean().sqrt())

    truth, of_fit = all_made(theirs, 50), all_made(fitted, STEPS)
    found = {
        "own": rmse(all_made(theirs, STEPS), truth),
        "fitted": rmse(of_fit, all_made(smooth, 50) if usual.__name__ in NOISY else truth),
    }
    sampler = Sampler.load(out / f"nfe-{STEPS:02d}")
    labels = torch.arange(len(calls))
    found["saved"] = apart(of_fit, fewstep.sample(model, sampler, model.own_start(labels), labels))
    model.network.close()
    return found
