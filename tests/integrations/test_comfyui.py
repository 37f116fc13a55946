"""The nodes against a stub of ComfyUI's documented interface: what they show, what they give, and that a graph of them samples."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.integrations.test_kdiffusion import adds_noise, network
from tests.problems import mixture, statistics

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GridError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.core.curves import CURVES
from fewstep.core.spacings import KNOWN
from fewstep.integrations.comfyui import FewstepArtifact, FewstepSampler, FewstepSigmas, law_of
from fewstep.integrations.kdiffusion import sample_fewstep, sigmas_for
from fewstep.solvers import SOLVERS, takes_statistics

ROOT = Path(__file__).parents[2]
SAME = 1e-6


class Const:
    """Stands for ``comfy.model_sampling.CONST``."""


class Discrete:
    """Stands for ``ModelSamplingDiscrete``: a float32 table."""

    def __init__(self, schedule: DiscreteVP) -> None:
        self.sigmas = torch.exp(-schedule.lam(schedule.times[1:])).float()
        self.num_timesteps = len(self.sigmas)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]


class Continuous:
    """Stands for ``ModelSamplingContinuousEDM``: a range, and a table for compatibility."""

    sigma_min, sigma_max = torch.tensor(0.002), torch.tensor(80.0)
    sigmas = torch.linspace(math.log(0.002), math.log(80.0), 1000).exp()


class Flow(Const):
    """Stands for ``ModelSamplingDiscreteFlow``: shifted times, 1 to N."""

    def __init__(self, shift: float, count: int = 1000) -> None:
        t = torch.arange(1, count + 1) / count
        self.shift, self.num_timesteps = shift, count
        self.sigmas = shift * t / (1 + (shift - 1) * t)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]


class KSampler:
    """Stands for ``comfy.samplers.KSAMPLER``: how it calls the function it is made of."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        extra_args = {**extra_args, "denoise_mask": denoise_mask}
        seen = None if callback is None else lambda x: callback(x["i"], x["denoised"], x["x"], len(sigmas) - 1)
        return self.sampler_function(
            model_wrap, noise, sigmas, extra_args=extra_args, callback=seen, disable=disable_pbar, **self.extra_options
        )


class Model:
    """Stands for a MODEL, and for what a sampler function is called with: ``inner_model`` is the guider, which has the patcher."""

    def __init__(self, sampling, call=None) -> None:
        self.sampling, self.call = sampling, call
        self.inner_model = SimpleNamespace(model_patcher=self)

    def get_model_object(self, name: str):
        return {"model_sampling": self.sampling}[name]

    def __call__(self, x, sigma, model_options=None, seed=None, denoise_mask=None):
        return self.call(x, sigma)


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """ComfyUI's modules, as far as the nodes use them; gives ``models``."""
    names = {name: ModuleType(name) for name in ("comfy", "comfy.samplers", "comfy.model_sampling", "folder_paths")}
    names["comfy.samplers"].KSAMPLER = KSampler
    names["comfy.model_sampling"].CONST = Const
    paths = names["folder_paths"]
    paths.models_dir, paths.folder_names_and_paths = str(tmp_path / "models"), {}
    paths.add_model_folder_path = lambda name, path: paths.folder_names_and_paths.setdefault(name, ([], set()))[0].append(path)
    paths.get_folder_paths = lambda name: list(paths.folder_names_and_paths[name][0])
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path / "models"


@pytest.fixture
def custom_node(comfy):
    """The node folder, imported as ComfyUI does: from its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location("custom_nodes_fewstep", ROOT / "comfyui" / "fewstep" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(sigma, count=2):
    return (sigma * seeded_noise(range(count), (2,))).double()


def run(sampler, model, sigmas, x, seen=None, **extra):
    callback = None if seen is None else lambda *values: seen.append(values)
    return sampler.sample(model, sigmas, {"model_options": {}, "seed": 5, **extra}, callback, x, disable_pbar=True)


def saved(models, schedule, name="sd/nfe-04", solver="unipc-2", **ends):
    sampler = Sampler.build(make_solver(solver), make_grid("angle", schedule, 4, **ends), schedule)
    sampler.save(models / "fewstep" / name)
    return sampler


# -- the interface --------------------------------------------------------------------------------------------------------------------


def test_nodes_are_as_documented(custom_node):
    assert set(custom_node.NODE_CLASS_MAPPINGS) == set(custom_node.NODE_DISPLAY_NAME_MAPPINGS)
    for node in custom_node.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        for group in inputs.values():
            for entry in group.values():
                assert isinstance(entry, tuple)
                kind, options = entry[0], (entry[1] if len(entry) > 1 else {})
                assert isinstance(kind, (str, list))
                if isinstance(kind, list) and "default" in options:
                    assert options["default"] in kind
        assert isinstance(node.RETURN_TYPES, tuple)
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert callable(getattr(node(), node.FUNCTION))
        assert node.CATEGORY
    assert custom_node.NODE_CLASS_MAPPINGS["FewstepSampler"].RETURN_TYPES == ("SAMPLER",)
    assert custom_node.NODE_CLASS_MAPPINGS["FewstepSigmas"].RETURN_TYPES == ("SIGMAS",)


def test_outside_comfyui_a_node_says_so():
    for ask in (FewstepArtifact.INPUT_TYPES, lambda: FewstepSampler().build("unipc-2"), lambda: law_of(None)):
        with pytest.raises(FewstepError, match="exists only inside ComfyUI: elsewhere use"):
            ask()


# -- sampling -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not takes_statistics(name) and not adds_noise(make_solver(name))])
@pytest.mark.every(5, 2)
def test_a_graph_samples(comfy, solver):
    table = DiscreteVP.scaled_linear()
    model = Model(Discrete(table), network(mixture(VarianceExploding())))
    (sigmas,) = FewstepSigmas().levels(model, "angle", 5)
    (sampler,) = FewstepSampler().build(solver, "")
    seen = []
    ours = run(sampler, model, sigmas, start(float(sigmas[0])), seen)
    ve = VarianceExploding()
    reference = Sampler.build(make_solver(solver), TimeGrid(sigmas), ve)
    torch.testing.assert_close(ours, sample(mixture(ve), reference, start(float(sigmas[0]))), rtol=SAME, atol=SAME)
    assert len(seen) == reference.nfe
    assert {total for *_, total in seen} == {5}
    assert [seen[0][0], seen[-1][0]] == [0, 4]


def test_a_flow_model_is_recognised(comfy):
    schedule = RectifiedFlow(shift=3.0)
    model = Model(Flow(3.0), network(mixture(schedule), "flow"))
    (sigmas,) = FewstepSigmas().levels(model, "uniform", 4)
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]), rtol=0, atol=2e-3)  # its table ends at 0.003
    ours = run(FewstepSampler().build("unipc-2")[0], model, sigmas, start(1.0))
    torch.testing.assert_close(ours, sample_fewstep(network(mixture(schedule), "flow"), start(1.0), sigmas, law="flow"))
    forced = run(FewstepSampler().build("unipc-2", law="flow")[0], Model(None, model.call), sigmas, start(1.0))
    assert torch.equal(forced, ours)


def test_the_law_of_an_unpatched_model_is_found_too(comfy):
    model = Model(None, network(mixture(VarianceExploding())))
    model.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=Flow(1.0)))
    levels = torch.tensor([0.9, 0.5, 0.0])
    flow = run(FewstepSampler().build("ddim")[0], model, levels, start(0.9))
    assert torch.equal(flow, sample_fewstep(model, start(0.9), levels, solver="ddim", law="flow"))
    model.inner_model = SimpleNamespace()
    with pytest.raises(FewstepError, match="choose law eps or flow"):
        run(FewstepSampler().build("ddim")[0], model, levels, start(0.9))


def test_options_reach_the_solver(comfy):
    model = Model(Continuous(), network(mixture(VarianceExploding())))
    sigmas = torch.tensor([8.0, 3.0, 1.0, 0.3, 0.0])
    ours = run(FewstepSampler().build("unipc-3", " weights=bh1:corrector=false ")[0], model, sigmas, start(8.0))
    solver = make_solver("unipc-3", weights="bh1", corrector=False)
    assert torch.equal(ours, sample_fewstep(model, start(8.0), sigmas, solver=solver))
    with pytest.raises(SolverError, match="has no option eta"):
        run(FewstepSampler().build("unipc-3", "eta=1")[0], model, sigmas, start(8.0))
    with pytest.raises(FewstepError, match="unknown law"):
        FewstepSampler().build("unipc-3", "", "vp")


def test_noise_comes_from_the_seed_and_belongs_to_the_image(comfy):
    model = Model(Continuous(), network(mixture(VarianceExploding())))
    sigmas = torch.tensor([8.0, 3.0, 1.0, 0.3, 0.0])
    (sampler,) = FewstepSampler().build("sde-dpm-solver-pp-2m")
    three = run(sampler, model, sigmas, start(8.0, 3))
    assert torch.equal(three[:2], run(sampler, model, sigmas, start(8.0, 2)))
    other = run(sampler, model, sigmas, start(8.0, 3), seed=6)
    assert not torch.isclose(three, other).any()
    assert bool(torch.isfinite(sampler.sample(model, sigmas, {}, None, start(8.0), disable_pbar=True)).all())


# -- levels ---------------------------------------------------------------------------------------------------------------------------


def test_levels_are_those_that_the_network_knows(comfy):
    sampling = Discrete(DiscreteVP.scaled_linear())
    for spacing in ("angle", "karras", "logsnr", "uniform", "quadratic", "trailing"):
        (sigmas,) = FewstepSigmas().levels(Model(sampling), spacing, 6)
        assert sigmas.dtype == torch.float32
        assert len(sigmas) == 7
        assert sigmas[-1] == 0
        off = torch.stack([(sampling.sigmas / level - 1).abs().min() for level in sigmas[:-1]])
        assert float(off.max()) < 1e-5
    assert float(sigmas[0]) == pytest.approx(float(sampling.sigma_max), rel=1e-5)


@pytest.mark.parametrize("sampling", [Discrete(DiscreteVP.scaled_linear()), Continuous(), Flow(3.0)], ids=lambda one: type(one).__name__)
def test_the_menu_has_the_noise_levels_of_other_programs(comfy, sampling):
    """Each as `make_grid` lays it; what a law does not have is refused in words."""
    (menu,) = (FewstepSigmas.INPUT_TYPES()["required"]["spacing"][0],)
    assert menu == list(KNOWN) and {"Karras", "exponential", "simple", "sgm_uniform", "beta", "normal", "kl_optimal"} < set(menu)
    made = []
    for name in (*CURVES, "shift"):
        try:
            (levels,) = FewstepSigmas().levels(Model(sampling), name, 5)
        except GridError as error:
            assert ("is none" in str(error)) == (name == "shift"), (name, error)
            continue
        made.append(name)
        assert len(levels) == 6 and bool((torch.diff(levels) < 0).all())
    assert len(made) >= len(CURVES) - 1 and ("shift" in made) == isinstance(sampling, Flow)
    sharp, plain = (FewstepSigmas().levels(Model(sampling), "beta", 5, spacing_options=text)[0] for text in ("alpha=0.3:beta=0.3", ""))
    assert not torch.equal(sharp, plain)
    with pytest.raises(GridError, match="levels of normal have an end of their own: leave end at clean, or say it in spacing_options"):
        FewstepSigmas().levels(Model(sampling), "normal", 5, end="sigma_min")
    assert float(FewstepSigmas().levels(Model(sampling), "normal", 5, spacing_options="end=sigma_min")[0][-1]) > 0


def test_denoise_takes_the_end_of_more_steps(comfy):
    model = Model(Continuous())
    (part,) = FewstepSigmas().levels(model, "karras", 4, 0.5)
    (whole,) = FewstepSigmas().levels(model, "karras", 8)
    assert torch.equal(part, whole[-5:])
    assert len(FewstepSigmas().levels(model, "karras", 4, 0.0)[0]) == 0


@pytest.mark.parametrize("end", ["clean", "append", "sigma_min"])
@pytest.mark.parametrize("sampling", [Discrete(DiscreteVP.scaled_linear()), Continuous(), Flow(3.0)], ids=lambda one: type(one).__name__)
def test_strength_begins_at_one_level(comfy, sampling, end):
    """Whatever the spacing and the number of steps, of which there are exactly so many."""
    model, firsts, flow = Model(sampling), set(), isinstance(sampling, Flow)
    for spacing in ("angle", "karras", "uniform", "quadratic", *(("leading", "trailing") if isinstance(sampling, Discrete) else ())):
        for steps in (2, 5, 9):
            (levels,) = FewstepSigmas().levels(model, spacing, steps, end=end, strength=0.3)
            assert len(levels) == steps + 1 and bool((torch.diff(levels) < 0).all()) and levels.dtype == torch.float32
            firsts.add(float(levels[0]))
    assert len(firsts) == 1 and firsts.pop() == pytest.approx(0.3 if flow else 3 / 7, rel=1e-2 if isinstance(sampling, Discrete) else 1e-5)
    whole = (FewstepSigmas().levels(model, "angle", 5, end=end, strength=strength)[0] for strength in (1, 1.0))
    assert all(torch.equal(levels, FewstepSigmas().levels(model, "angle", 5, end=end)[0]) for levels in whole)
    assert len(FewstepSigmas().levels(model, "angle", 4, end=end, strength=0.0)[0]) == 0
    assert len(FewstepSigmas().levels(model, "angle", 1, end=end, strength=0.3)[0]) == 2


def test_strength_beside_denoise_or_a_sampler_is_refused(comfy):
    model = Model(Continuous())
    with pytest.raises(GridError, match=r"denoise \(0.5\) counts steps and strength \(0.3\) is a noise level: leave one of the two at 1"):
        FewstepSigmas().levels(model, "angle", 4, 0.5, strength=0.3)
    with pytest.raises(GridError, match="strength is the share of noise"):
        FewstepSigmas().levels(model, "angle", 4, strength=-0.1)
    saved(comfy, VarianceExploding())
    (chosen,) = FewstepArtifact().load("sd/nfe-04")
    with pytest.raises(GridError, match="strength must be 1, got 0.3; use a spacing, and in Fewstep Sampler a solver without the artifact"):
        FewstepSigmas().levels(model, "angle", 4, artifact=chosen, strength=0.3)


def test_a_graph_from_an_image_samples(comfy):
    model = Model(Continuous(), network(mixture(VarianceExploding())))
    (sigmas,) = FewstepSigmas().levels(model, "karras", 5, strength=0.3)
    x0 = torch.ones(2, 2, dtype=torch.float64)
    ours = run(FewstepSampler().build("unipc-2")[0], model, sigmas, x0 + start(float(sigmas[0])))
    sampler = Sampler.build("unipc-2", TimeGrid(sigmas), VarianceExploding())
    torch.testing.assert_close(ours, sample(mixture(VarianceExploding()), sampler, x0 + start(float(sigmas[0]))), rtol=SAME, atol=SAME)


def test_ends(comfy):
    model = Model(Continuous())
    levels = {end: FewstepSigmas().levels(model, "karras", 4, end=end)[0] for end in ("clean", "append", "sigma_min")}
    assert all(len(value) == 5 for value in levels.values())
    assert levels["append"][-2:].tolist() == pytest.approx([0.002, 0.0])
    assert levels["sigma_min"][-1] == pytest.approx(0.002)
    torch.testing.assert_close(levels["clean"][:-1], levels["sigma_min"][:-1])
    with pytest.raises(FewstepError, match="unknown end"):
        FewstepSigmas().levels(model, "karras", 4, end="there")


def test_a_table_that_stands_still_has_its_range(comfy):
    sampling = Discrete(DiscreteVP.scaled_linear())
    sampling.sigmas = sampling.sigmas.clamp(max=10.0)
    sampling.sigma_max = sampling.sigmas[-1]
    assert float(FewstepSigmas().levels(Model(sampling), "karras", 4)[0][0]) == pytest.approx(10.0)
    with pytest.raises(GridError, match="for models with discrete times"):
        FewstepSigmas().levels(Model(sampling), "trailing", 4)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, math.exp(1.15)])
def test_the_shift_is_read_from_the_table(comfy, shift):
    (sigmas,) = FewstepSigmas().levels(Model(Flow(shift, 10000)), "uniform", 2, end="append")
    t = (1 + 1e-4) / 2  # half-way between the first and the last time of the table
    expected = sigmas_for("uniform", 2, schedule=RectifiedFlow(shift, t_min=1e-4), law="flow", end="append")
    assert t > 0.5 and torch.allclose(sigmas, expected, rtol=1e-3)


# -- artifacts ------------------------------------------------------------------------------------------------------------------------


def test_artifacts_are_found_and_chosen(comfy, tmp_path):
    assert FewstepArtifact.INPUT_TYPES()["required"]["name"] == ([],)
    with pytest.raises(ArtifactError, match="no artifact below ComfyUI's models/fewstep"):
        FewstepArtifact().load("sd/nfe-04")
    sampler = saved(comfy, DiscreteVP.scaled_linear())
    statistics().save(comfy / "fewstep" / "ems")
    elsewhere = Sampler.save(sampler, tmp_path / "elsewhere" / "mine").parent
    (comfy / "fewstep" / "linked").symlink_to(elsewhere)
    assert FewstepArtifact.INPUT_TYPES()["required"]["name"] == (["ems", "linked/mine", "sd/nfe-04"],)
    (chosen,) = FewstepArtifact().load("sd/nfe-04")
    assert chosen.artifact.nfe == 4
    for name in ("sd/nfe-05", "../../elsewhere/mine", str(elsewhere / "mine")):
        with pytest.raises(ArtifactError, match="unknown artifact"):
            FewstepArtifact().load(name)


def test_a_changed_artifact_is_seen(comfy):
    saved(comfy, DiscreteVP.scaled_linear())
    before = FewstepArtifact.IS_CHANGED("sd/nfe-04")
    assert FewstepArtifact.IS_CHANGED("sd/nfe-04") == before
    saved(comfy, DiscreteVP.scaled_linear(), solver="ddim")
    assert FewstepArtifact.IS_CHANGED("sd/nfe-04") != before


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_saved_sampler_in_a_graph(comfy, kind):
    schedule = DiscreteVP.scaled_linear() if kind == "eps" else RectifiedFlow(shift=3.0)
    sampling = Discrete(schedule) if kind == "eps" else Flow(3.0)
    sampler = saved(comfy, schedule)
    (chosen,) = FewstepArtifact().load("sd/nfe-04")
    model = Model(sampling, network(mixture(schedule), kind))
    (sigmas,) = FewstepSigmas().levels(model, "karras", 99, artifact=chosen)
    assert torch.equal(sigmas, sigmas_for(sampler, law=kind))
    (node,) = FewstepSampler().build("unipc-2", artifact=chosen)
    x = start(float(sampler.tableau.nodes.sigma[0]))
    scale = sampler.tableau.nodes.alpha[0] if kind == "eps" else 1.0
    expected = sample(mixture(schedule), sampler, x)
    ours = run(node, model, sigmas, x / scale) * (sampler.tableau.nodes.alpha[-1] if kind == "eps" else 1.0)
    torch.testing.assert_close(ours, expected, rtol=SAME, atol=SAME)
    with pytest.raises(GridError, match="denoise must be 1"):
        FewstepSigmas().levels(model, "karras", 4, 0.5, artifact=chosen)
    with pytest.raises(GridError, match="the sampler starts at"):
        run(node, model, sigmas[1:], x)


def test_statistics_in_a_graph(comfy):
    ems = statistics(0.6, 0.2, 0.1)
    ems = type(ems)(ems.lam, *(value.expand(-1, 2) for value in (ems.l, ems.s, ems.b)), (2,), ems.schedule)
    ems.save(comfy / "fewstep" / "ems")
    (chosen,) = FewstepArtifact().load("ems")
    model = Model(Continuous(), network(mixture(VarianceExploding())))
    (sigmas,) = FewstepSigmas().levels(model, "karras", 5, artifact=chosen)
    (node,) = FewstepSampler().build("dpm-solver-v3", "steps=3", artifact=chosen)
    ours = run(node, model, sigmas, start(80.0))
    again = sample_fewstep(model, start(80.0), sigmas, solver="dpm-solver-v3:steps=3", statistics=comfy / "fewstep" / "ems")
    assert torch.equal(ours, again)
    with pytest.raises(ArtifactError, match="ems holds statistics, and unipc-2 takes none"):
        FewstepSampler().build("unipc-2", artifact=chosen)
    with pytest.raises(SolverError, match="needs statistics"):
        run(FewstepSampler().build("dpm-solver-v3")[0], model, sigmas, start(80.0))
