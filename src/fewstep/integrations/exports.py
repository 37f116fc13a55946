r"""Noise levels of a saved sampler, written as other programs take them.

A list of levels says where a network is evaluated, and nothing of what is made of its answers. So a list stands for a sampler only where
the program has the same solver: it is named then, and otherwise the list is refused unless ``levels_only`` is said. The coefficients of a
fitted sampler never travel with one.

A level is ``sigma/alpha`` (law ``eps``), or the ``sigma`` in 0 .. 1 of a flow's ``(1 - sigma) x0 + sigma eps`` (law ``flow``). It is
written in the fewest decimals that give back its float32, without an exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.core.schedule import RectifiedFlow
from fewstep.integrations.diffusers.solver_names import options_of
from fewstep.integrations.kdiffusion import Law, sigmas_for
from fewstep.runtime.artifact import named_path
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, SolverError
from fewstep.runtime.front_door import number
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import DPMSolverPP, spec_of, takes_statistics
from fewstep.solvers.stencil import NEVER

__all__ = [
    "TARGETS",
    "Export",
    "check_levels",
    "export",
    "saved_samplers",
    "to_comfyui",
    "to_diffusers",
    "to_kdiffusion",
    "to_sdcpp",
    "to_sigmas",
    "to_times",
    "to_vllm_omni",
]

FEW = 15  # steps of a grid, below which diffusers ends with lower orders
SAME = 1e-6  # of a level: what is as near to the maker's is it
WHOLE = 1e-6  # of a time: what is as near to a whole number is one

# Names of solvers, by the spec of ours (`spec_of`). The functions of k-diffusion are those that ComfyUI and stable-diffusion.cpp carry on.
FIRST_ORDER = ("euler", "ddim")  # the same numbers, on any law
DPMPP_2M, DPMPP_2M_SDE = "dpm-solver-pp-2m:lower_order_below=0", "sde-dpm-solver-pp-2m:lower_order_below=0"
CLEAN = {  # a last step to the clean image is of first order by any rule
    "dpm-solver-pp-2m": DPMPP_2M,
    "dpm-solver-pp-2m:euler_at_final=true": DPMPP_2M,
    "sde-dpm-solver-pp-2m": DPMPP_2M_SDE,
    "sde-dpm-solver-pp-2m:euler_at_final=true": DPMPP_2M_SDE,
}
K_DIFFUSION = {
    "euler": "sample_euler",
    "ddim": "sample_euler",
    "ddim:eta=1.0": "sample_euler_ancestral",
    "heun": "sample_heun",
    DPMPP_2M: "sample_dpmpp_2m",
    "euler-ancestral": "sample_euler_ancestral",
    "dpm2-ancestral": "sample_dpm_2_ancestral",
    "dpm-solver-pp-2s-ancestral": "sample_dpmpp_2s_ancestral",
    "dpm-solver-pp-sde": "sample_dpmpp_sde",
    DPMPP_2M_SDE: "sample_dpmpp_2m_sde",
    "sde-dpm-solver-pp-3m": "sample_dpmpp_3m_sde",
}
COMFYUI = {
    **{spec: name.removeprefix("sample_") for spec, name in K_DIFFUSION.items()},
    "lcm": "lcm",
    "ddpm": "ddpm",
    "seeds-2": "seeds_2",
    "seeds-3": "seeds_3",
    "er-sde-3:integrals=sum": "er_sde",
}
SDCPP = {"euler": "euler", "ddim": "euler", "ddim:eta=1.0": "euler_a", "euler-ancestral": "euler_a", "heun": "heun", DPMPP_2M: "dpm++2m"}
UNSHIFTED = (
    "shift=1.0, use_dynamic_shifting=False, shift_terminal=None, use_karras_sigmas=False, use_exponential_sigmas=False, "
    "use_beta_sigmas=False"
)


@dataclass(frozen=True)
class Export:
    """A list of noise levels, or of times, as another program takes it.

    Attributes:
        target: the program, one of `TARGETS`.
        argument: what the list is there: ``sigmas``, ``timesteps`` or ``times``.
        values: the numbers, float32; the end is among them where the program wants it.
        law: what they measure: ``eps`` for ``sigma/alpha``, ``flow`` for a flow's ``sigma``.
        solver: the name there of the solver that they are for; None where only the levels were asked for.
        text: the list as it is typed or pasted there.
        use: how to use it there, a line or two.
    """

    target: str
    argument: str
    values: tuple[float, ...]
    law: Law
    solver: str | None
    text: str
    use: str


def export(sampler: Sampler, to: str, *, shift: float | None = None, levels_only: bool = False) -> Export:
    """Write the noise levels of a sampler for another program.

    Args:
        sampler: a saved one (`saved_samplers`), or one that was just made.
        to: the program, one of `TARGETS`.
        shift: of the scheduler there that shifts the levels it is given, for ``diffusers`` (default 1) and ``vllm-omni`` (no default).
        levels_only: take the levels alone, where the program has no such solver.

    Raises:
        FewstepError: an unknown program (and those that there are), or a shift where none is undone.
        SolverError: a solver that the program does not have, or a sampler of a reflected model.
        GridError: levels that the program cannot be given.
    """
    if to not in TARGETS:
        raise FewstepError(f"unknown target {to!r}: a list of levels is written for {', '.join(TARGETS)}")
    sampler.check_unbounded(to)
    sampler.tableau.check_asks(f"{to} calls the network at every level")
    if to in SHIFTED:
        return SHIFTED[to](sampler, shift, levels_only)
    if shift is not None:
        raise GridError(f"{to} takes levels as they are: leave the shift out; it is for {' and '.join(SHIFTED)}")
    return PLAIN[to](sampler, levels_only)


def check_levels(sampler: Sampler, levels: Sequence[float]) -> None:
    """Refuse a sampler that evaluates elsewhere than at the levels that a distilled checkpoint was made for.

    Args:
        sampler: the sampler.
        levels: the maker's list, ``sigma/alpha`` or a flow's ``sigma``; its end may be left out.

    Raises:
        GridError: they are no numbers, or other ones (the first that differs).
    """
    nodes, flow = sampler.tableau.nodes, _law(sampler) == "flow"
    ours = (nodes.sigma if flow else torch.exp(-nodes.lam)).tolist()
    try:
        theirs = [float(level) for level in levels]
    except (TypeError, ValueError):
        raise GridError(f"a maker's list is one of noise levels, as [14.6, 2.9, 0.0], got {str(levels)[:80]!r}") from None
    if len(theirs) not in (nodes.evaluations, nodes.evaluations + 1):
        raise GridError(
            f"the maker's list has {len(theirs)} levels, and the sampler evaluates {nodes.evaluations} times: a distilled network is "
            "sampled at its maker's levels alone"
        )
    for k, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if not math.isclose(mine, other, rel_tol=SAME, abs_tol=SAME):
            raise GridError(
                f"level {k} of the sampler is {mine:.8g}, in the maker's list {other:.8g}: a distilled network is sampled at its maker's "
                "levels alone, so build the sampler on them"
            )


def saved_samplers(place: str | Path) -> list[Sampler]:
    """Load the samplers of a folder, fewest evaluations first.

    Args:
        place: a folder with ``sampler.json`` or with ``nfe-NN/sampler.json``, or a ``sampler.json``.

    Raises:
        ArtifactError: there are none, or one is damaged.
    """
    folder = named_path(place)
    folder = folder.parent if folder.name == "sampler.json" else folder
    paths = [folder] if (folder / "sampler.json").is_file() else [path.parent for path in folder.glob("nfe-*/sampler.json")]
    if not paths:
        raise ArtifactError(f"no sampler in {place}: it should hold sampler.json or nfe-NN/sampler.json, as fewstep fit writes them")
    return sorted((Sampler.load(path) for path in paths), key=lambda sampler: sampler.nfe)


# -- programs that take levels as they are --------------------------------------------------------------------------------------------


def to_sigmas(sampler: Sampler, levels_only: bool = False) -> Export:
    """Write the levels ``[M+1]``, the last among them, as a plain list for whatever takes one.

    The solver is named as here. Any hand-made one will do but for those whose coefficients come from a model.

    Raises:
        SolverError: a fitted sampler, or one of DPM-Solver-v3, without ``levels_only``.
    """
    spec = spec_of(sampler.solver, sampler.options)
    named = None if spec is None or takes_statistics(spec) else spec
    if named is None and not levels_only:
        raise SolverError(_stays(sampler, "sigmas", "run it with fewstep.sample"))
    law = _law(sampler)
    use = f"{_measure(law)}, for the solver {named}" if named else f"{_measure(law)}; {_left_behind(sampler)}"
    return _exported("sigmas", sigmas_for(sampler, law=law), law, named, use, between=", ")


def to_kdiffusion(sampler: Sampler, levels_only: bool = False) -> Export:
    """Write the levels ``[M+1]`` for k-diffusion: ``sigma/alpha``, since its states are ``x0 + sigma eps``.

    ``sigmas`` go to ``sample_*(model, x, sigmas)`` as they are, the 0 at their end included, as its ``get_sigmas_karras`` makes them
    (github.com/crowsonkb/k-diffusion, sampling.py).

    Raises:
        SolverError: a solver that it does not have, without ``levels_only``.
        GridError: a start of pure noise, which has no finite level there.
    """
    name = _named(sampler, "kdiffusion", K_DIFFUSION, levels_only, "run it with fewstep.integrations.kdiffusion.sample_fewstep(sampler=)")
    use = f"k_diffusion.sampling.{name or 'sample_...'}(model, x, torch.tensor(sigmas)), with x = x0 + sigmas[0] * noise"
    return _exported("kdiffusion", sigmas_for(sampler, law="eps"), "eps", name, _used(sampler, use, name), between=", ", ends="[]")


def to_comfyui(sampler: Sampler, levels_only: bool = False) -> Export:
    """Write the levels ``[M+1]`` for ComfyUI's node ManualSigmas, whose SIGMAS the sampling nodes take as they are.

    It reads integers and decimals "separated with any non numeric character" (github.com/Comfy-Org/ComfyUI/pull/11499,
    docs.comfy.org/built-in-nodes/ManualSigmas), so an exponent would be read as two numbers: none is written. A flow model takes its own
    sigma, any shift included; the model's shift node changes only what schedulers make.

    Raises:
        SolverError: a solver that it does not have, without ``levels_only``.
        GridError: a start of pure noise on a law that is no flow.
    """
    law = _law(sampler)
    name = _named(sampler, "comfyui", COMFYUI, levels_only, "use the nodes of comfyui/fewstep, see docs/comfyui.md", law)
    use = f"paste it into ManualSigmas, and lead that to SamplerCustom with KSamplerSelect on {name or 'a solver of your choice'}"
    return _exported("comfyui", sigmas_for(sampler, law=law), law, name, _used(sampler, use, name), between=", ")


def to_sdcpp(sampler: Sampler, levels_only: bool = False) -> Export:
    """Write the levels ``[M+1]`` for the option ``--sigmas`` of stable-diffusion.cpp.

    It takes "custom sigma values for the sampler, comma-separated (e.g. "14.61,7.8,3.5,0.0")" as they are and makes one step less than
    their number, so the 0 at the end is among them (github.com/leejet/stable-diffusion.cpp, examples/cli/README.md and ``SamplePlan`` in
    stable-diffusion.cpp; a flow's are its own sigma).

    Raises:
        SolverError: a solver that it does not have, without ``levels_only``.
        GridError: a start of pure noise on a law that is no flow.
    """
    law = _law(sampler)
    name = _named(sampler, "sdcpp", SDCPP, levels_only, "run it with fewstep.sample", law)
    levels = sigmas_for(sampler, law=law)
    use = f"sd ... --steps {len(levels) - 1} --sampling-method {name or '...'} --sigmas LIST"
    return _exported("sdcpp", levels, law, name, _used(sampler, use, name), between=",")


def to_times(sampler: Sampler, levels_only: bool = False) -> Export:
    """Write the times ``[M+1]`` of a flow for an ODE solver that takes a list of them, from noise at 0 to the data at 1.

    Text-to-speech models of the family of F5-TTS integrate ``dx/dt = v(x, t)`` from ``t = 0``, the noise, to ``t = 1``, the data, by
    Euler's method at a list of times (github.com/SWivid/F5-TTS, f5_tts/model/cfm.py: ``odeint(fn, y0, t, method="euler")``; arXiv
    2410.06885). A level ``sigma`` of a flow is the time ``1 - sigma`` there. A sway that a program adds to its times has to be off.

    Raises:
        SolverError: another solver than Euler's, without ``levels_only``.
        GridError: a law that is no flow, or a start that is not pure noise.
    """
    if not isinstance(sampler.schedule, RectifiedFlow):
        raise GridError(f"times are those of a flow from noise at 0 to data at 1, and this sampler's law is {str(sampler.schedule)[:80]}")
    levels = sampler.schedule.sigma(sampler.grid.t.detach())
    if levels[0] != 1:
        raise GridError(f"such an ODE starts from noise at time 0, and this sampler at time {1 - float(levels[0]):.4g}: start it at noise")
    otherwise = "run it with fewstep.sample, as a Model whose prediction is reversed-flow"
    name = _named(sampler, "times", dict.fromkeys(FIRST_ORDER, "euler"), levels_only, otherwise, "flow")
    use = "odeint(velocity, noise, torch.tensor(LIST), method='euler'), without a sway of its own (sway_sampling_coef=None)"
    return _exported("times", 1 - levels, "flow", name, _used(sampler, use, name), between=", ", ends="[]", argument="times")


# -- programs that change what they are given -----------------------------------------------------------------------------------------


def to_diffusers(sampler: Sampler, shift: float | None = None, levels_only: bool = False) -> Export:
    """Write what ``set_timesteps`` of a scheduler of diffusers takes, and a pipeline's call with it.

    UniPC of a flow is refused: diffusers' cuts the times that a network is told, which its levels do not follow.

    - A flow: ``sigmas [M]`` of ``FlowMatchEulerDiscreteScheduler``, which shifts them once more, by ``shift`` or by ``mu`` where
      ``use_dynamic_shifting`` is on, and appends the 0 itself (its ``set_timesteps``; github.com/huggingface/diffusers/issues/14461). By
      default the list is the levels as they are, for the scheduler without any shift that ``use`` makes. With ``shift`` it is that before
      the shift, for a pipeline's own scheduler: its ``shift``, or ``exp(mu)`` of an exponential dynamic one.
    - A table, Euler's method: ``sigmas [M+1]`` of ``EulerDiscreteScheduler``, the end among them.
    - A table, DPM-Solver++: ``timesteps [M]`` of ``DPMSolverMultistepScheduler``, which cuts them to whole numbers: others are refused.

    Raises:
        SolverError: a solver that takes no list there, without ``levels_only``.
        GridError: a law that is neither, an end that the scheduler cannot have, times that it would cut, or a shift of a table.
    """
    spec, flow = spec_of(sampler.solver, sampler.options), isinstance(sampler.schedule, RectifiedFlow)
    if not flow and sampler.schedule.times is None:
        raise GridError(f"diffusers' schedulers have a table of times or a flow, and this sampler's law is {sampler.schedule}")
    if not flow and shift is not None:
        raise GridError("only a flow's levels are shifted, and this sampler is of a table of times: leave the shift out")
    if not flow and spec is not None and _is_dpmpp(sampler) and not levels_only:
        return _timesteps(sampler, spec)
    scheduler = "FlowMatchEulerDiscreteScheduler" if flow else "EulerDiscreteScheduler"
    others = "load it with fewstep.integrations.diffusers.FewstepScheduler.from_sampler"
    if flow and spec is not None and spec.startswith("unipc") and not levels_only:
        raise SolverError(
            "UniPCMultistepScheduler cuts the times that its network is told to whole numbers (999 at sigma = 1, 562 at 0.5625), so no "
            f"list makes it ask where this sampler asks: {others}, or take the levels alone (--levels-only, levels_only=True)"
        )
    name = _named(sampler, "diffusers", dict.fromkeys(FIRST_ORDER, scheduler), levels_only, others)
    if not flow:
        use = f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config); pipe(..., sigmas=LIST)"
        levels = sigmas_for(sampler, law="eps")
        return _exported("diffusers", levels, "eps", name, _used(sampler, use, name), between=", ", ends="[]")
    levels = _unshifted(sampler, 1.0 if shift is None else shift, "FlowMatchEulerDiscreteScheduler")
    own = f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {UNSHIFTED})"
    if shift not in (None, 1.0):
        own = f"a pipeline whose {scheduler} shifts by {shift:g}, or dynamically by mu = {np.log(shift):.6g}, and changes nothing else"
    use = f"{own}; pipe(..., sigmas=LIST)"
    return _exported("diffusers", levels, "flow", name, _used(sampler, use, name), between=", ", ends="[]")


def to_vllm_omni(sampler: Sampler, shift: float | None = None, levels_only: bool = False) -> Export:
    """Write the ``sigmas [M]`` of ``OmniDiffusionSamplingParams`` of vLLM-Omni, for flows.

    Its pipelines hand a request's ``sigmas`` to diffusers' ``FlowMatchEulerDiscreteScheduler`` with a ``mu`` of the picture's size
    (github.com/vllm-project/vllm-omni, vllm_omni/diffusion/models/qwen_image), which shifts them and appends the 0. A request cannot turn
    that off, so the shift has to be said: the scheduler's ``shift``, or ``exp(mu)``. HunyuanVideo 1.5's pipeline ignores the list.

    Raises:
        SolverError: another solver than Euler's, without ``levels_only``.
        GridError: no shift, a law that is no flow, or an end that is not the clean image.
    """
    if not isinstance(sampler.schedule, RectifiedFlow):
        raise GridError(f"vllm-omni takes the sigmas of flows, and this sampler's law is {str(sampler.schedule)[:80]}")
    if shift is None:
        raise GridError("vllm-omni shifts the sigmas that it is given: say by what, its scheduler's shift or exp(mu), 1 for none")
    scheduler = "FlowMatchEulerDiscreteScheduler"
    name = _named(sampler, "vllm-omni", dict.fromkeys(FIRST_ORDER, scheduler), levels_only, "run it with fewstep.sample")
    levels = _unshifted(sampler, shift, "vllm-omni")
    use = f"OmniDiffusionSamplingParams(num_inference_steps={len(levels)}, sigmas=LIST), for a pipeline that reads sigmas"
    return _exported("vllm-omni", levels, "flow", name, _used(sampler, use, name), between=", ", ends="[]")


PLAIN: Mapping[str, Callable[[Sampler, bool], Export]] = {
    "sigmas": to_sigmas,
    "comfyui": to_comfyui,
    "kdiffusion": to_kdiffusion,
    "sdcpp": to_sdcpp,
    "times": to_times,
}
SHIFTED: Mapping[str, Callable[[Sampler, float | None, bool], Export]] = {"diffusers": to_diffusers, "vllm-omni": to_vllm_omni}
TARGETS = ("sigmas", "diffusers", "comfyui", "kdiffusion", "sdcpp", "vllm-omni", "times")


# -- what they share ------------------------------------------------------------------------------------------------------------------


def _law(sampler: Sampler) -> Law:
    return "flow" if isinstance(sampler.schedule, RectifiedFlow) else "eps"


def _measure(law: Law) -> str:
    return "sigma of a flow, 0 .. 1" if law == "flow" else "sigma/alpha"


def _named(sampler: Sampler, target: str, names: Mapping[str, str], levels_only: bool, otherwise: str, law: Law = "eps") -> str | None:
    """Return the name that the sampler's solver has there; None with ``levels_only`` where it has none.

    On a flow only Euler's method is the same there: theirs of higher order are polynomials in the flow's sigma.
    """
    spec = spec_of(sampler.solver, sampler.options)
    clean = bool(sampler.schedule.sigma(sampler.grid.t[-1].detach()) == 0)
    if clean and spec is not None:
        spec = CLEAN.get(spec, spec)
    name = None if spec is None or law == "flow" and spec not in FIRST_ORDER else names.get(spec)
    if name is None and not levels_only:
        raise SolverError(_stays(sampler, target, otherwise))
    return name


def _stays(sampler: Sampler, target: str, otherwise: str) -> str:
    spec = spec_of(sampler.solver, sampler.options)
    if spec is None or takes_statistics(spec):
        return (
            f"the coefficients of a {sampler.name} sampler do not travel with a list of levels: {otherwise}, or take the levels alone "
            f"(--levels-only, levels_only=True)"
        )
    return (
        f"{target} has no solver that is {spec} on these levels and takes a list: {otherwise}, or take the levels alone (--levels-only, "
        f"levels_only=True)"
    )


def _left_behind(sampler: Sampler) -> str:
    return f"the levels alone: what {sampler.name} makes of the network's answers there does not travel with them"


def _used(sampler: Sampler, use: str, name: str | None) -> str:
    return use if name is not None else f"{use}\n{_left_behind(sampler)}"


def _unshifted(sampler: Sampler, shift: float, scheduler: str) -> Tensor:
    """Return a flow's levels ``[M]`` before a shift, without the 0 at their end that the scheduler appends."""
    shift = number(shift, "the shift", GridError)
    if not 0 < shift < float("inf"):
        raise GridError(f"a shift is above 0, got {shift:g}")
    levels = sampler.schedule.sigma(sampler.grid.t.detach())
    if levels[-1] != 0:
        raise GridError(f"{scheduler} appends a 0 to its sigmas, and this sampler ends at {float(levels[-1]):.4g}: make it end clean")
    return (levels / (shift - (shift - 1) * levels))[:-1]  # the inverse of shift u / (1 + (shift - 1) u)


def _is_dpmpp(sampler: Sampler) -> bool:
    """Return whether diffusers' DPM-Solver++ is the sampler's solver: its lower orders at the end are a switch, its third the published."""
    known = {"third_order": ("published",), "lower_order_below": (FEW, NEVER)}
    return sampler.solver == DPMSolverPP.__name__ and all(sampler.options[key] in values for key, values in known.items())


def _timesteps(sampler: Sampler, spec: str) -> Export:
    """Return the whole times ``[M]`` of a table for diffusers' DPM-Solver++."""
    times, schedule = sampler.grid.t.detach(), sampler.schedule
    cut = (times[:-1] - times[:-1].round()).abs() > WHOLE
    if bool(cut.any()):
        raise GridError(
            f"DPMSolverMultistepScheduler cuts times to whole numbers, and this sampler evaluates at {float(times[:-1][cut][0]):g}: use a "
            f"spacing of whole times, FewstepScheduler.from_sampler, or the levels alone (--levels-only, levels_only=True)"
        )
    if times[-1] not in (schedule.t_clean, 0.0):
        raise GridError(f"DPMSolverMultistepScheduler ends at the clean image or at time 0, and this sampler at time {float(times[-1]):g}")
    ends = "zero" if times[-1] == schedule.t_clean else "sigma_min"
    chosen = {**options_of(spec), "final_sigmas_type": ends}
    options = ", ".join(f"{key}={chosen[key]!r}" for key in (*OPTIONS, "final_sigmas_type"))
    name = "DPMSolverMultistepScheduler"
    whole = tuple(times[:-1].round().tolist())
    text = f"[{', '.join(str(int(time)) for time in whole)}]"
    use = f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, {options}); pipe(..., timesteps=LIST)"
    return Export("diffusers", "timesteps", whole, "eps", name, text, use)


OPTIONS = ("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final")


def _exported(
    target: str, levels: Tensor, law: Law, solver: str | None, use: str, *, between: str, ends: str = "", argument: str = "sigmas"
) -> Export:
    words = [np.format_float_positional(level, unique=True, trim="0") for level in levels.to(torch.float32).numpy()]
    text = between.join(words)
    return Export(target, argument, tuple(map(float, words)), law, solver, f"{ends[:1]}{text}{ends[1:]}", use)
