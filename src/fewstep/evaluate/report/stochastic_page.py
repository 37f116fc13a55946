"""The page of a benchmark of stochastic samplers."""


def write_stochastic(results, out): ...
