"""What the tests of solvers share beside their problems."""

from collections.abc import Iterator

import pytest
from torch import Tensor

from fewstep.core.statistics import Integrals, ModelStatistics, Rule

MOST = 4  # moments that any variant of DPM-Solver-v3 asks for


@pytest.fixture(scope="module")
def each_integral_once() -> Iterator[None]:
    """The variants of DPM-Solver-v3 integrate the same statistics over the same steps: each integral is computed once."""
    real, known = ModelStatistics.integrals, {}

    def integrals(statistics: ModelStatistics, s: Tensor, t: Tensor, count: int, rule: Rule) -> Integrals:
        key = (id(statistics), float(s), float(t), rule)
        if key not in known:
            known[key] = (statistics, real(statistics, s, t, MOST, rule))  # the statistics too: no other may get its id
        found = known[key][1]
        return found._replace(moments=found.moments[:count])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelStatistics, "integrals", integrals)
        yield
