"""Mistakes at the front door: each is a `FewstepError` that says what to pass instead, none an error from inside."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.problems import DSNO, toy
from torch import nn

import fewstep
from fewstep import (
    ArtifactError,
    DiscreteVP,
    DPMSolverV3,
    FewstepError,
    GaussianDenoiser,
    GridError,
    Model,
    ModelError,
    ModelStatistics,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    classifier_free,
    load_model,
    make_grid,
    make_solver,
    sample,
    steps,
)
from fewstep.models.carried import Carried
from fewstep.models.generate import best_sampler, sampler_for, solver_for
from fewstep.sampling.grid_table import GridTable
from fewstep.solvers import LCM, EulerAncestral, HeunChurn, SASolver, SDEDPMSolverPP3M, UniPC

NET, LAW = nn.Identity(), DiscreteVP.linear()
PLAIN, LABELLED, SHAPELESS = toy(), toy(classes=2), replace(toy(), shape=None)
OTHER = toy(VarianceExploding(0.05, 25.0))
DENOISER = GaussianDenoiser(VPLinear(), torch.zeros(2), torch.tensor(1.0))
TWO_BY_TWO = torch.zeros(2, 2, 2)


def model(**options):
    return Model(NET, LAW, "epsilon", **{"shape": (2,), **options})


def asked(what="ddim", x=None, cond=None, of=PLAIN, **options):
    return sample(
        of, what, x, cond, **{**({"nfe": 3} if isinstance(what, str) else {}), **({} if x is not None else {"seeds": [1, 2]}), **options}
    )


def some_statistics(**of):
    lam, ones = torch.linspace(-4, 4, 5), torch.ones(5, 1, 1)
    return ModelStatistics(lam, ones, ones, ones, (2, 2), PLAIN.schedule, **of)


def fitted(of=PLAIN, nfe=3, guidance=1.0, **card):
    facts = {"name": "fitted", "of": of.name, "model": of.fingerprint, "guidance": guidance, **card}
    return Sampler.build("ddim", "angle", of.schedule, nfe=nfe, card=facts)


def tables(of=PLAIN, *nfe, **changes):
    facts = {"solver": "ddim", "model": of.fingerprint, "guidance": 1.0, "schedule": of.schedule}
    return GridTable(**{**facts, "grids": {n: make_grid("angle", of.schedule, n) for n in nfe}, **changes})


def carrying(of=PLAIN, **artifacts):
    return replace(of, given=Carried(**artifacts), name="toy")


SAMPLE = {
    # what is sampled
    "a name": (lambda: asked(of="digits-edm"), ModelError, r"not a name: load it first, as in fewstep.load_model\('digits-edm'\)"),
    "a network": (lambda: asked(of=NET), ModelError, "takes a fewstep.Model, not a Identity: wrap a network .* shape="),
    "no shape": (lambda: asked(of=SHAPELESS), ModelError, "does not know the shape of its samples: make the Model with shape="),
    "a denoiser alone": (lambda: sample(DENOISER, "ddim", nfe=2, seeds=[1]), ModelError, "does not know the shape .*: pass x=, the start"),
    # by what
    "a number": (lambda: asked(5), SolverError, "a solver's name, a Solver, a Sampler or a Tableau, not a int"),
    "a class": (lambda: asked(UniPC), SolverError, r"UniPC is a class: make a solver of it first, as in UniPC\(\)"),
    "a path": (lambda: asked(Path("runs/fitted")), SolverError, "not a PosixPath: load a folder by fewstep.Sampler.load"),
    "a misspelt name": (lambda: asked("unipc-4"), SolverError, "unknown solver 'unipc-4': did you mean .*unipc-3"),
    "a misspelt option": (lambda: asked("ddim:eto=1"), SolverError, "solver 'ddim' has no option eto; it has: eta"),
    "statistics that are not there": (lambda: asked("dpm-solver-v3"), SolverError, "needs statistics of toy at guidance 1: make them with"),
    "statistics for a denoiser": (
        lambda: sample(DENOISER, "dpm-solver-v3", torch.zeros(1, 2), nfe=2),
        SolverError,
        r"needs statistics of its model: pass fewstep.DPMSolverV3\(statistics\) instead",
    ),
    "statistics of another model": (
        lambda: asked(DPMSolverV3(some_statistics(model="0" * 16)), nfe=3),
        ArtifactError,
        "these statistics were made for model",
    ),
    "nothing for a denoiser": (lambda: sample(DENOISER, None, torch.zeros(1, 2), nfe=2), SolverError, "say which sampler: a solver's name"),
    "a fitted sampler of a denoiser": (
        lambda: sample(DENOISER, "fitted", torch.zeros(1, 2), nfe=2),
        SolverError,
        "a fitted sampler is one of a Model, for a number of evaluations: pass nfe=",
    ),
    "a fitted sampler for any number": (lambda: sample(PLAIN, "fitted", seeds=[1]), SolverError, "a fitted sampler is one of a Model, for"),
    "a fitted sampler that is not there": (lambda: asked("fitted"), SolverError, "no fitted sampler of toy with 3 evaluations at"),
    "a fitted sampler on another grid": (
        lambda: asked("fitted", grid="karras"),
        GridError,
        "has noise levels and coefficients of its own: leave grid and statistics out",
    ),
    "a sampler of another model": (lambda: asked(fitted(OTHER)), ArtifactError, "is a sampler of toy .* not of toy"),
    "a sampler of another guidance": (
        lambda: asked(fitted(LABELLED), of=LABELLED, guidance=2.0),
        ArtifactError,
        r"at guidance 1, not of toy \(\w+\) at 2",
    ),
    # how often
    "no nfe": (lambda: sample(PLAIN, "ddim", seeds=[1]), SolverError, "how many network evaluations ddim may use: pass nfe="),
    "no nfe for a solver": (lambda: sample(PLAIN, UniPC(), seeds=[1]), SolverError, "how many network evaluations UniPC may use"),
    "nfe as a list": (lambda: asked(nfe=[5, 8]), SolverError, r"nfe is one number of network evaluations, as nfe=8, got \[5, 8\]"),
    "nfe as text": (lambda: asked(nfe="5"), SolverError, "nfe is one number"),
    "half an evaluation": (lambda: asked(nfe=2.5), SolverError, "a whole number of at least 1, got 2.5"),
    "an odd number for heun": (lambda: asked("heun", nfe=5), SolverError, "cannot use exactly 5: use 4 or 6"),
    "another nfe than the sampler's": (lambda: asked(fitted(), nfe=4), SolverError, "makes 3 evaluations, not 4: leave nfe out"),
    "another nfe than the tableau's": (lambda: asked(fitted().tableau, nfe=4), SolverError, "makes 3 evaluations, not 4: leave nfe out"),
    # where
    "a misspelt grid": (lambda: asked(grid="karas"), GridError, "unknown grid 'karas': did you mean karras"),
    "a list of times": (lambda: asked(grid=[20.0, 1.0, 0.1]), GridError, r"a spacing or a fewstep.TimeGrid\(times\), got a list"),
    "a grid of other steps": (lambda: asked(grid=make_grid("angle", PLAIN.schedule, 4)), GridError, "makes 4 evaluations of DDIM, not 3"),
    "a grid for a sampler": (lambda: asked(fitted(), grid="karras"), GridError, "a sampler has a grid of its own: leave grid out"),
    "a grid for nothing": (lambda: sample(PLAIN, None, nfe=3, seeds=[1], grid="karras"), GridError, "a grid belongs to a solver: name one"),
    "a grid that is not carried": (lambda: asked(grid="optimized"), GridError, "no optimized grid of toy for ddim at guidance 1"),
    "a carried grid of one's own solver": (lambda: asked(UniPC(), nfe=3, grid="optimized"), GridError, "a Model carries, for a solver"),
    # from where
    "no seeds": (lambda: sample(PLAIN, "ddim", nfe=3), ModelError, r"say which samples: pass seeds=, as in seeds=range\(4\), or x="),
    "a single seed": (lambda: asked(seeds=7), FewstepError, r"whole numbers, one for each sample, as in seeds=range\(4\), got '7'"),
    "seeds that are not whole": (lambda: asked(seeds=[0.5]), FewstepError, r"seeds are whole numbers, .* got '\[0\.5\]'$"),
    "seeds that are true or not": (lambda: asked(seeds=[True, False]), FewstepError, "seeds are whole numbers"),
    "seeds that are a mask": (lambda: asked(seeds=np.array([True, False])), FewstepError, "seeds are whole numbers"),
    "a number that is true": (lambda: asked(nfe=True), SolverError, "nfe is one number of network evaluations, as nfe=8, got True"),
    "seeds that are negative": (lambda: asked(seeds=[0, -1]), FewstepError, r"got .*: they lie between 0 and 2\^63"),
    "seeds that are too large": (lambda: asked(seeds=[2**64]), FewstepError, r"seeds are whole numbers.*: they lie between 0 and 2\^63"),
    "seeds in a square": (lambda: asked(seeds=torch.zeros(2, 2)), FewstepError, "seeds are whole numbers"),
    "other seeds than starts": (lambda: asked(x=TWO_BY_TWO, seeds=[1, 2, 3]), ModelError, "3 seeds for 2 starts: pass one for each"),
    "a start that is no tensor": (lambda: asked(x=[[0.0]]), ModelError, "a tensor .*, not a list: .* pass seeds= alone"),
    "a start of another shape": (lambda: asked(x=torch.zeros(2, 3, 3)), ModelError, r"the network refused a state of shape \(2, 3, 3\)"),
    "no noise": (lambda: asked("ddim:eta=1", x=TWO_BY_TWO), SolverError, "adds noise: pass seeds=, one for each of the 2 samples"),
    # with what
    "guidance as text": (lambda: asked(guidance="much"), ModelError, "guidance is a scale, as 2.0, got 'much'"),
    "guidance without a null label": (lambda: asked(guidance=2), ModelError, "toy cannot be guided: .*; use guidance 1"),
    "guidance that is not finite": (lambda: asked(of=LABELLED, guidance=float("nan")), ModelError, "guidance is a scale, as 2.0, got nan"),
    "guidance of a denoiser": (
        lambda: sample(DENOISER, "ddim", torch.zeros(1, 2), nfe=2, guidance=2),
        ModelError,
        "only a Model can be guided by a scale: wrap the denoiser with fewstep.classifier_free",
    ),
    "labels that do not fit": (lambda: asked(of=LABELLED, cond=torch.zeros(3)), ModelError, r"shape \(3,\), which is not one for each"),
    "one label for all": (lambda: asked(of=LABELLED, cond=torch.zeros(1)), ModelError, r"shape \(1,\), which is not one for each of 2"),
    "a label that there is not": (lambda: asked(of=LABELLED, cond=[0, 3]), ModelError, r"labels 0 to 1, one for each of 2 .*\[0, 3\]"),
    "a negative label": (lambda: asked(of=LABELLED, cond=[0, -1]), ModelError, "toy has labels 0 to 1, one for each of 2"),
    "a scale beyond float32": (lambda: asked(of=LABELLED, guidance=1e300), ModelError, "guidance wants a finite scale, .* got 1e\\+300"),
    "labels that are true or not": (lambda: asked(of=LABELLED, cond=[True, False]), ModelError, "toy has labels 0 to 1, one for each of 2"),
    "one-hot labels, guided": (
        lambda: asked(of=LABELLED, cond=torch.eye(2), guidance=2),
        ModelError,
        r"guided away from the label 2, so its condition is labels \[B\], whole numbers, not torch.float32 of shape \(2, 2\)",
    ),
    "a start of whole numbers": (lambda: asked(x=TWO_BY_TWO.long()), ModelError, "x is the start, in floating point, not in int64"),
    "an empty list of seeds": (lambda: asked(seeds=[]), ModelError, "makes no samples: pass at least one, as seeds="),
    "a complex start": (lambda: asked(x=TWO_BY_TWO.cfloat()), ModelError, "x is the start, in floating point, not in complex64"),
    "a start without a batch": (lambda: asked(x=torch.zeros(2, 2)), ModelError, r"start of a batch, \[B, 2, 2\], got shape \(2, 2\)"),
    "a start that is a number": (lambda: asked(x=torch.tensor(1.0)), ModelError, r"start of a batch, \[B, 2, 2\], got shape \(\)"),
    "observe as a list": (lambda: asked(observe=[]), FewstepError, r"a function that is called with each Step, got \[\]"),
    # in what state
    "dropout in training": (
        lambda: asked(of=replace(PLAIN, network=nn.Sequential(nn.Dropout(0.1)))),
        ModelError,
        "the network has a Dropout in training mode, so its answers vary: call network.eval",
    ),
    "normalisation in training": (
        lambda: fewstep.fit(replace(PLAIN, network=nn.Sequential(nn.BatchNorm1d(2))), nfe=3),
        ModelError,
        "the network has a BatchNorm1d in training mode",
    ),
    # misspelt
    "a misspelt argument": (lambda: sample(PLAIN, "ddim", nef=3, seeds=[1]), FewstepError, "keyword argument 'nef'; did you mean nfe"),
    "nothing at all": (lambda: sample(), FewstepError, "missing a required argument: 'model'; it takes model, what, x"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE)
@pytest.mark.every(2)
def test_sample_says_what_to_pass(case):
    ask, kind, says = SAMPLE[case]
    with pytest.raises(kind, match=says) as error:
        ask()
    assert "\n" not in str(error.value)


MODELS = {
    "no network": (lambda: Model(None, LAW, "epsilon"), "a model's network is a module or a function, got NoneType"),
    "no law": (lambda: Model(NET, "epsilon", LAW), "a schedule is a noise law, as fewstep.DiscreteVP.* got 'epsilon'"),
    "a law's class": (lambda: Model(NET, VPLinear, "epsilon"), "a schedule is a noise law, .* got <class"),
    "an unknown prediction": (lambda: Model(NET, LAW, "eps"), "unknown prediction type 'eps': did you mean epsilon"),
    "no prediction": (lambda: Model(NET, LAW, None), "a prediction type is a name, as 'epsilon'"),
    "shape as a number": (lambda: model(shape=4), r"that of one sample without the batch, as \(4, 64, 64\), got 4"),
    "shape as text": (lambda: model(shape="1x8x8"), "that of one sample without the batch"),
    "a shape of letters": (lambda: model(shape=(1, "a")), "that of one sample without the batch"),
    "an empty shape": (lambda: model(shape=()), "that of one sample without the batch"),
    "a negative side": (lambda: model(shape=(1, -8)), "that of one sample without the batch"),
    "no classes": (lambda: model(classes=0), "the number of class labels, or None, got 0"),
    "classes as text": (lambda: model(classes="ten"), "the number of class labels, or None, got 'ten'"),
    "time as a number": (lambda: model(time=1000), "time and call are functions, .* got 1000, None"),
    "call as a number": (lambda: model(call=3), "time and call are functions"),
    "classes as True": (lambda: model(classes=True), "the number of class labels, or None, got True"),
    "half a null label": (lambda: model(null_label=2.5), "null_label is a whole number, got 2.5"),
    "a null label that is true": (lambda: model(null_label=True), "null_label is a whole number, got True"),
    "a null label as text": (lambda: model(null_label="a"), "null_label is a whole number, got 'a'"),
    "a null label that is no number": (lambda: model(null_label=float("nan")), "null_label is a whole number, got nan"),
    "whole numbers as dtype": (lambda: model(dtype=torch.int8), "dtype is the floating dtype that the network computes in"),
    "a dtype that nothing computes in": (
        lambda: model(dtype=torch.float8_e4m3fn),
        "dtype is the floating dtype that the network computes in",
    ),
    "a time that is true or not": (lambda: model(time_dtype=torch.bool), "time_dtype is the dtype of the network's time"),
    "a complex time": (lambda: model(time_dtype=torch.complex64), "time_dtype is the dtype of the network's time"),
    "a time of eight bits": (lambda: model(time_dtype=torch.float8_e4m3fn), "time_dtype is the dtype of the network's time"),
    "a dtype as text": (lambda: model(dtype="float16"), "dtype is the floating dtype .* got 'float16'"),
    "a time's dtype as text": (lambda: model(time_dtype="int64"), "time_dtype is the dtype of the network's time, .* got 'int64'"),
    "a name as number": (lambda: model(name=5), "name of a Model is a word, got '5'"),
    "an identity as number": (lambda: model(identity=5), "identity of a Model is a word"),
    "data as number": (lambda: model(data=5), "data of a Model is the name of a data set, or None, got '5'"),
    "a folder as number": (lambda: model(folder=5), "folder of a Model is the folder it was loaded from, or None"),
    "given as a dict": (lambda: model(given={}), "given of a Model is a Carried, or None"),
    "a card as text": (lambda: model(card="a"), "card of a Model is a dict of facts"),
    "a function as flow map": (lambda: model(flow_map=lambda x, s, t, cond: x), "flow_map is a fewstep.FlowMap, got function: subclass it"),
    "two facts": (
        lambda: Model(NET, LAW),
        "Model: missing a required argument: 'prediction'; it takes network, schedule, prediction, shape",
    ),
    "a misspelt fact": (lambda: model(shpae=(2,)), "Model: got an unexpected keyword argument 'shpae'; did you mean shape"),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.every(3, 2)
def test_a_model_says_what_it_is_made_of(case):
    ask, says = MODELS[case]
    with pytest.raises(FewstepError, match=says):
        ask()


T = torch.tensor(10.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda x, time: (x, x), r"answered a tuple of 2, not a tensor: pass call=lambda net, x, t, cond: net\(x, t\)\[0\]"),
        (lambda x, time: {"out": x}, "answered a dict of 1, not a tensor: pass call="),
        (lambda x, time: None, "answered a NoneType, not a tensor: pass call="),
        (lambda x, time: x.cfloat(), "answered in complex64: an answer is of floating point numbers"),
        (lambda x, time: x.long(), "answered in int64"),
        (lambda x, time: x > 0, "answered in bool"),
        (lambda x, time: torch.cat([x, x], 1), r"answered shape \(2, 6\) to .* \(2, 3\): it predicts a variance too, so pass call="),
        (lambda x, time: x.mul_(2), r"the network writes into its input: pass call=lambda net, x, t, cond: net\(x.clone\(\), t\)"),
        (lambda x, time: x[:, :1].zero_().expand(2, 3), "the network writes into its input"),
        (lambda x, time: x[:, :1], r"answered shape \(2, 1\) to a state of shape \(2, 3\)"),
        (lambda x, time: x.no_such_thing, "the network refused a state of shape .*no_such_thing"),
        (lambda x, time: [x][1], "the network refused a state of shape .*list index out of range"),
    ],
)
def test_what_a_network_may_do_wrong(network, says):
    with pytest.raises(ModelError, match=says):
        Model(network, LAW, "v")(torch.zeros(2, 3), T)


ARTIFACTS = {
    "a label that there is not": (lambda: LABELLED.labels([0], 2), ModelError, "toy has labels 0 to 1, got 2"),
    "a label of none": (lambda: PLAIN.labels([0], 0), ModelError, "toy takes no labels"),
    "grids of another solver": (
        lambda: carrying(grids=[tables(PLAIN, 3)]).optimized("heun", 4),
        GridError,
        "for heun at guidance 1, there are some for ddim at 1: make a sampler with 'fewstep optimize",
    ),
    "grids of other weights": (
        lambda: carrying(grids=[tables(PLAIN, 3, model="0" * 16)]).optimized("ddim", 3),
        ArtifactError,
        "were made for other weights",
    ),
    "a fitted sampler of other weights": (
        lambda: carrying(samplers=[fitted(PLAIN, model=OTHER.fingerprint)]).fitted(3),
        ArtifactError,
        "the fitted samplers .* were made for other weights",
    ),
    "nothing carried": (
        lambda: best_sampler(PLAIN, 5),
        SolverError,
        "toy carries no sampler for 5 evaluations at guidance 1: name a solver",
    ),
    "nothing carried for any number": (lambda: best_sampler(PLAIN), SolverError, "say how to sample toy: name a solver, .* fewstep.fit"),
    "several carried": (
        lambda: best_sampler(carrying(samplers=[fitted(nfe=3), fitted(nfe=6)], grids=[tables(PLAIN, 4)])),
        SolverError,
        "it carries samplers for 3, 4, 6 evaluations: pass nfe=",
    ),
    "others carried": (
        lambda: best_sampler(carrying(samplers=[fitted(nfe=3), fitted(nfe=6)]), 5),
        SolverError,
        "no sampler for 5 evaluations at guidance 1: it carries some for 3, 6; name a solver",
    ),
    "passes that a student does not make": (
        lambda: load_model(DSNO).optimized("ddim", 9),
        GridError,
        "digits-dsno makes 1, 2, 3, 4 passes, not 9",
    ),
    "grids of a student's solver": (
        lambda: load_model(DSNO).optimized("heun", 2),
        GridError,
        "is a student, which jumps by ddim alone",
    ),
    "fits of a student": (
        lambda: load_model(DSNO).fitted(2),
        SolverError,
        "is a student, which has passes and no fitted samplers",
    ),
    "statistics of another guidance": (
        lambda: solver_for("dpm-solver-v3", PLAIN, statistics=some_statistics(guidance=2.0)),
        ArtifactError,
        "these statistics were made for guidance 2.0, but are used with guidance 1",
    ),
}


@pytest.mark.parametrize("case", ARTIFACTS)
def test_a_model_says_what_it_does_not_carry(case):
    ask, kind, says = ARTIFACTS[case]
    with pytest.raises(kind, match=says):
        ask()


NOISY = Sampler.build("ddim:eta=1", "angle", PLAIN.schedule, nfe=2).tableau
TABLEAU = Sampler.build("ddim", "angle", PLAIN.schedule, nfe=3).tableau


def heun():
    return Sampler.build("heun", "angle", PLAIN.schedule, nfe=4).tableau


def resumed(at, state=None):
    return list(steps(PLAIN, TABLEAU, TWO_BY_TWO, resume=(at, state or TABLEAU.start(TWO_BY_TWO))))


PARTS = {
    "a step before the first": (lambda: make_solver("unipc-2:uncorrected=[-1]"), "uncorrected is a list of steps, counted from 0"),
    "a step that is true": (lambda: make_solver("unipc-2", uncorrected=[True]), "uncorrected is a list of steps, counted from 0"),
    "steps with a misspelt argument": (lambda: steps(PLAIN, TABLEAU, TWO_BY_TWO, sede=[1]), "steps: .*'sede'; did you mean seeds"),
    "steps from before the start": (lambda: resumed(-1), "resume at an evaluation from 0 to 3, got -1"),
    "steps from beyond the end": (lambda: resumed(99), "resume at an evaluation from 0 to 3, got 99"),
    "steps from another solver's state": (lambda: resumed(1, heun().start(TWO_BY_TWO)), "is that of another solver"),
    "steps from a number": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, resume=1)), "resume is an evaluation and the state before it"),
    "an edit that is a number": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, edit=5)), "edit is a function, .* got a int"),
    "noise that is a tensor": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, noise=TWO_BY_TWO)), "noise is a function, .* got a Tensor"),
    "an edit to whole numbers": (
        lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, edit=lambda step: step.x_next.long())),
        "edit answered in int64: an answer is of floating point numbers",
    ),
    "steps with one seed": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, seeds=3)), "seeds are whole numbers, one for each sample"),
    "steps with a generator": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, seeds=torch.Generator())), "seeds are whole numbers"),
    "steps from a sparse start": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO.to_sparse())), "a dense tensor, not one of sparse_coo"),
    "an edit that answers a number": (lambda: list(steps(PLAIN, TABLEAU, TWO_BY_TWO, edit=lambda step: 5)), "edit answered a int"),
    "noise for one sample": (
        lambda: list(steps(PLAIN, NOISY, TWO_BY_TWO, noise=lambda i: TWO_BY_TWO[:1])),
        r"noise answered shape \(1, 2, 2\) for a state of shape \(2, 2, 2\)",
    ),
    "an option twice": (lambda: make_grid("karras:rho=1:rho=2", LAW, 4), "says rho twice: leave one out"),
    "an option in and beside a name": (lambda: make_solver("ddim:eta=1", eta=0.5), "says eta=1, and eta=0.5 is passed beside it"),
    "an option that is no number": (lambda: make_solver("ddim:eta=nan"), "option eta of solver 'ddim' is a number, got 'nan'"),
    "a spacing's option that is no number": (lambda: make_grid("karras:rho=a", LAW, 4), "option rho of grid 'karras' is a number, got 'a'"),
    "a spacing beyond the table": (lambda: make_grid("angle:t_max=1500", LAW, 4), "this law has times from 999 down to -1, not from 1500"),
    "a law of words": (lambda: VarianceExploding(t_min="a"), "VarianceExploding: t_min is a number, got 'a'"),
    "a law the wrong way round": (lambda: VarianceExploding(80, 1), "a VarianceExploding needs .* t_clean <= t_min < t_max"),
    "a law below its end": (lambda: VarianceExploding(t_min=-1), "a VarianceExploding needs .* t_clean <= t_min < t_max"),
    "a misspelt law": (lambda: VPLinear(beta_mni=3), "VPLinear: .*'beta_mni'; did you mean beta_min"),
    "falling betas": (lambda: VPLinear(20, 0.1), "needs 0 <= beta_min <= beta_max"),
    "half a time": (lambda: DiscreteVP.linear(1000.5), "the number of times is a whole number, got 1000.5"),
    "betas of letters": (lambda: DiscreteVP.from_betas("abc"), "a table of betas or alphas_cumprod is a list of numbers, got 'abc'"),
    "sigma_data of letters": (lambda: fewstep.EDM("a"), "sigma_data of EDM preconditioning is a number, got 'a'"),
    "a part from half an evaluation": (lambda: fitted().tail(1.5), "the evaluation to begin at is a whole number, got 1.5"),
    "a part from a word": (lambda: fitted().after("a"), "the noise level to begin at is a number, got 'a'"),
    "make_solver of nothing": (lambda: make_solver(), "make_solver: missing a required argument: 'name'"),
    "make_solver of a number": (lambda: make_solver(3), "a name is text, as 'ddim:eta=0.5', got int 3"),
    "make_solver without a value": (lambda: make_solver("ddim:eta"), "'ddim:eta' should read name:option=value"),
    "make_solver without statistics": (lambda: make_solver("dpm-solver-v3"), "needs statistics of its model"),
    "make_solver of the wrong kind": (
        lambda: make_solver("unipc-2:lower_order_below=many"),
        "option lower_order_below of UniPC is a whole number, got 'many'",
    ),
    "a solver's option in words": (lambda: EulerAncestral(eta="1"), "option eta of EulerAncestral is a number, got '1'"),
    "a solver's option that is nothing": (lambda: HeunChurn(s_churn=None), "option s_churn of HeunChurn is a number, got 'None'"),
    "a solver's switch as a number": (lambda: SDEDPMSolverPP3M(euler_at_final=0.5), "euler_at_final of .* is True or False, got 0.5"),
    "a solver's count that is not whole": (lambda: SASolver(predictor=2.0), "option predictor of SASolver is a whole number, got 2.0"),
    "a solver's option beyond all numbers": (lambda: LCM(s_noise=10**400), "option s_noise of LCM is a number, got '1000"),
    "a configuration beyond all numbers": (lambda: fewstep.MatchingConfig(lr=10**400), "lr is a number, got 1000"),
    "DPMSolverV3 of nothing": (lambda: DPMSolverV3(), "DPMSolverV3: missing a required argument: 'statistics'"),
    "make_grid without a law": (lambda: make_grid("angle", None, 5), "a spacing is laid out on a noise law, as in make_grid"),
    "make_grid the other way round": (lambda: make_grid(LAW, "angle", 5), "a name is text"),
    "make_grid of text": (lambda: make_grid("angle", LAW, "5"), "at least 1 step, a whole number of them, got '5'"),
    "a TimeGrid of text": (lambda: TimeGrid("abc"), r"a grid is a list of times, as TimeGrid\(\[1.0, 0.5, 0.0\]\), got 'abc'"),
    "a TimeGrid of nothing": (lambda: TimeGrid(None), "a grid is a list of times"),
    "a Sampler of a number": (lambda: Sampler.build(5, "angle", LAW, nfe=3), "a solver is a name or a Solver, got int 5"),
    "a Sampler of a class": (lambda: Sampler.build(UniPC, "angle", LAW, nfe=3), "got the class UniPC: make one first"),
    "a Sampler on a number": (lambda: Sampler.build("ddim", 5, LAW, nfe=3), "a grid is the name of a spacing or a fewstep.TimeGrid"),
    "a Sampler of no law": (lambda: Sampler.build("ddim", "angle", "vp", nfe=3), "a sampler is made for a noise law, .* got str vp"),
    "a Sampler without nfe": (lambda: Sampler.build("ddim", "angle", LAW), "the spacing 'angle' needs a number of evaluations: pass nfe="),
    "a misspelt card": (lambda: Sampler.build("ddim", "angle", LAW, nfe=3, crad={}), "build: got an unexpected keyword argument 'crad'"),
    "load_model of a number": (lambda: load_model(5), "a model is loaded by a name, a folder or a file, got int 5"),
    "load_model of nothing": (lambda: load_model(), "load_model: missing a required argument: 'name'"),
    "steps of a sampler": (lambda: next(steps(PLAIN, fitted(), TWO_BY_TWO)), "runs a Tableau, as sampler.tableau, not a Sampler"),
    "steps of a network": (
        lambda: next(steps(NET, fitted().tableau, TWO_BY_TWO)),
        "a Identity is no denoiser, .* make a fewstep.Model of it",
    ),
    "guidance by text": (lambda: classifier_free(DENOISER, "much", None), "the scale of guidance is a number"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.every(2)
def test_the_parts_say_what_to_pass(case):
    ask, says = PARTS[case]
    with pytest.raises(FewstepError, match=says):
        ask()


# -- what is right ----------------------------------------------------------------------------------------------------


def test_whatever_stands_for_a_sampler_gives_the_same_samples():
    solver, grid = UniPC(), make_grid("karras", PLAIN.schedule, 4)
    sampler = Sampler.build(solver, grid, PLAIN.schedule)
    ends = [
        sample(PLAIN, "unipc-2", nfe=4, seeds=range(3), grid="karras"),
        sample(PLAIN, solver, nfe=4, seeds=torch.arange(3), grid=grid),
        sample(PLAIN, solver, seeds=(seed for seed in range(3)), grid=grid),
        sample(PLAIN, sampler, seeds=[0, 1, 2]),
        sample(PLAIN, sampler.tableau, seeds=[0, 1, 2], nfe=4),
        sample(PLAIN, sampler, fewstep.start_noise(sampler.tableau.nodes, range(3), (2, 2))),
    ]
    assert ends[0].shape == (3, 2, 2) and not any(end.requires_grad for end in ends)
    for end in ends[1:]:
        assert torch.equal(end, ends[0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_are_whole_numbers_of_any_dtype(dtype):
    labels = np.array([1, 0, 1], dtype=dtype)
    for guidance in (1.0, 2.0):
        given, plain = (sample(LABELLED, "ddim", nfe=2, seeds=range(3), guidance=guidance, cond=cond) for cond in (labels, [1, 0, 1]))
        assert torch.equal(given, plain)
    with pytest.raises(ModelError, match="toy has labels 0 to 1, one for each of 3 samples"):
        sample(LABELLED, "ddim", nfe=2, seeds=range(3), cond=labels + np.array([0, 0, 2], dtype=dtype))


def test_labels_of_no_seeds_are_whole_numbers_too():
    assert LABELLED.labels([]).dtype == torch.int64


def test_labels_are_those_of_the_seeds():
    labels = torch.tensor([1, 0, 1])
    by_seed, by_hand = (sample(LABELLED, "ddim", nfe=3, seeds=[5, 2, 1], cond=cond) for cond in (None, labels))
    assert torch.equal(by_seed, by_hand)
    other = sample(LABELLED, "ddim", nfe=3, seeds=[5, 2, 1], cond=1 - labels)
    guided = sample(LABELLED, "ddim", nfe=3, seeds=[5, 2, 1], guidance=3)
    assert float((by_seed - other).abs().max()) > 1e-3 and float((by_seed - guided).abs().max()) > 1e-3


def test_the_best_of_what_is_carried_is_taken_and_named(caplog):
    card = {"rows": [{"nfe": 4, "error": [0.2, 0.3]}, {"nfe": 3, "error": [0.5, 0.6]}]}
    worse, better = tables(PLAIN, 3, 4, solver="heun", card={"rows": [{"nfe": 4, "error": [0.4, 0.5]}]}), tables(PLAIN, 3, 4, card=card)
    it = carrying(samplers=[fitted(nfe=3)], grids=[worse, better])
    caplog.set_level("INFO", logger="fewstep")
    assert sampler_for(it, None, nfe=3).card["name"] == "fitted"
    chosen = best_sampler(it, 4)
    assert (chosen.solver, chosen.card["grid"], chosen.nfe) == ("DDIM", "optimized", 4)
    assert torch.equal(sample(it, nfe=4, seeds=[1]), sample(it, chosen, seeds=[1]))
    assert "toy is sampled by Sampler(ddim, 4 evaluations, noise levels 20 to 0.05), which it carries" in caplog.text


def test_a_tuned_model_is_sampled_as_it_was_tuned():
    model, student = load_model("digits-edm-3step"), load_model(DSNO)
    assert best_sampler(model).nfe == model.tuned.nfe == 3
    assert torch.equal(sample(model, seeds=[1]), sample(model, "ddim", nfe=3, grid="optimized", seeds=[1]))
    assert [best_sampler(student, jumps).nfe for jumps in student.num_jumps] == [1, 2, 3, 4] and best_sampler(student).nfe == 1


def test_weights_without_values_are_named() -> None:
    model = replace(PLAIN, network=nn.Linear(2, 2).to("meta"), call=lambda net, x, t, cond: net(x))
    with pytest.raises(ModelError, match="weights on the device meta, which have no values: load them first"):
        sample(model, "ddim", nfe=2, seeds=[0])
