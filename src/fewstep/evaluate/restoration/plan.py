"""Plan the rows of a benchmark of restorations: tasks, methods, solvers and evaluations by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import nn

from fewstep.core.spacings import check_grid_name
from fewstep.evaluate.restoration.rows import PSEUDO_INVERSE, RestorationKey
from fewstep.inverse.method import Method
from fewstep.inverse.posterior import checked_prior, make_method
from fewstep.inverse.steps import restored_grid, restored_steps
from fewstep.inverse.tasks import TASKS, Task, make_task, picture_shape
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.problem import Problem, check_seeds
from fewstep.runtime.errors import FewstepError, GridError, ModelError, SolverError, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked_class, is_count
from fewstep.runtime.spec import parse_spec
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, takes_statistics

__all__ = ["STRIDE", "RestorationBenchConfig", "RestorationEntry", "planned_restorations", "restoration_cost"]

STRIDE = 1 << 20  # from the seed of a picture's sample to that of its next one


@checked_class
@dataclass(frozen=True)
class RestorationBenchConfig:
    """Name the rows of a benchmark of restorations, and what they share.

    Attributes:
        tasks: see `make_task`.
        methods: see `make_method`; the first one is what the others are compared with.
        solvers: names of solvers.
        nfe: network evaluations of a sample, with those of the method.
        grid: the name of a spacing; by default ``karras``, or ``angle`` where the model starts without any signal.
        num: pictures, the first of the data.
        seed: of the first picture's noises; the next has the next seed.
        samples: of each of the first pictures, for the mean, the spread and the coverage.
        several: how many pictures have several samples; all, where there are no more.
        batch: samples at a time.
        data: the pictures, as `load_images` takes them, best ones that the model was not trained on; by default the model's own.
        features: in which distances to the truth are measured: as for `Setup`.

    Raises:
        FewstepError: an unknown name, or a number that cannot be.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...] = ("moments", "projection")
    solvers: tuple[str, ...] = ("ddim",)
    nfe: tuple[int, ...] = (10, 20)
    grid: str | None = None
    num: int = 256
    seed: int = 0
    samples: int = 19
    several: int = 32
    batch: int = 64
    data: str | None = None
    features: str | nn.Module | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_seeds(self.seed, self.num)
        at_least(self, num=2, samples=1, several=0, batch=1)
        if self.num > STRIDE:
            raise FewstepError(f"num is at most {STRIDE}, so that each sample has a seed of its own, got {self.num}")
        object.__setattr__(self, "several", min(self.several, self.num))
        lists = {"task": self.tasks, "method": self.methods, "solver": self.solvers, "nfe": self.nfe}
        for name, words in lists.items():
            if isinstance(words, str) or not isinstance(words, Sequence):
                raise FewstepError(f"a benchmark of restorations takes several of each {name}, as a tuple, got {words!r}")
            if not words:
                raise FewstepError(f"a benchmark of restorations needs at least one {name}")
        for word in self.tasks:
            look_up(parse_spec(word, ModelError)[0], TASKS, "task", ModelError)
        for word in self.methods:
            make_method(word)
        for word in self.solvers:
            if word != FITTED and not takes_statistics(word):
                make_solver(word)
        if self.grid is not None:
            check_grid_name(self.grid, OPTIMIZED)
        for count in self.nfe:
            if not is_count(count):
                raise SolverError(f"nfe must be a whole number of at least 1, got {count}")

    @property
    def made(self) -> int:
        """The samples that each row makes: one of each picture, and the further ones of the first pictures."""
        return self.num + (self.samples - 1) * self.several


@dataclass(frozen=True, eq=False)
class RestorationEntry:
    """Name one row to be made.

    Attributes:
        task: what is to be undone.
        name, method: by name, and made; the pseudo-inverse has none.
        solver, grid: by name.
        nfe: network evaluations of a sample that are planned.
        sampler: of the solver and grid, with as many steps as the method leaves.
    """

    task: Task
    name: str
    method: Method | None = None
    solver: str = ""
    grid: str = ""
    nfe: int = 0
    sampler: Sampler | None = None

    @property
    def key(self) -> RestorationKey:
        """The identifier of its row."""
        return self.task.name, self.name, self.solver, self.grid, self.nfe

    @property
    def products(self) -> int:
        """The backward passes through the network that a sample takes."""
        return 0 if self.method is None or self.sampler is None else self.method.cost[1] * self.sampler.nfe


def planned_restorations(problem: Problem, config: RestorationBenchConfig) -> tuple[list[RestorationEntry], list[str]]:
    """Return the rows of a benchmark in their order, each key once, and what cannot be one, with the reason.

    Raises:
        ModelError: the model makes no pictures or is a student; a task or method that its pictures or its network do not allow.
        SolverError: no row is left (and why).
    """
    model, shape = problem.model, picture_shape(problem.model)
    tasks = {task.name: task for task in (make_task(spec, shape) for spec in config.tasks)}
    methods = {spec: make_method(spec) for spec in config.methods}
    for method in methods.values():
        checked_prior(model, method)
    grid = restored_grid(model.schedule) if config.grid is None else config.grid
    samplers, left_out = dict[tuple[str, str, int], Sampler](), list[str]()
    for name, solver, nfe in product(methods, config.solvers, config.nfe):
        try:
            samplers[name, solver, nfe] = restored_steps(model, methods[name], solver, nfe, grid, problem.guidance)
        except (SolverError, GridError) as error:
            left_out.append(f"{name} {solver} {nfe}: {error}")
    if not samplers:
        raise SolverError("; ".join(left_out))
    made = list[RestorationEntry]()
    for task in tasks.values():
        made.append(RestorationEntry(task, PSEUDO_INVERSE))
        made += [RestorationEntry(task, key[0], methods[key[0]], key[1], grid, key[2], sampler) for key, sampler in samplers.items()]
    return made, left_out


def restoration_cost(entries: Sequence[RestorationEntry], config: RestorationBenchConfig) -> tuple[int, int]:
    """Return how many network evaluations and backward passes the rows take together, at most."""
    return config.made * sum(one.nfe for one in entries), config.made * sum(one.products for one in entries)
