"""Say whether noise helps: the best sampler that adds noise beside the best that adds none, at equal evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fewstep.evaluate.stochastic.rows import NoiseRow

__all__ = ["Contest", "contests", "ranked_rows"]


class Contest(NamedTuple):
    """The rows of the least Frechet distance with so many evaluations, one of each kind.

    ``verdict`` is ``noise`` or ``no noise`` where the intervals of the two do not meet, ``not apart`` where they do, and None where a
    kind was not tried or has no intervals.
    """

    nfe: int
    stochastic: NoiseRow | None
    deterministic: NoiseRow | None
    verdict: Literal["noise", "no noise", "not apart"] | None


def contests(rows: Sequence[NoiseRow]) -> list[Contest]:
    """Compare the best rows of each kind, at each number of evaluations that some row made.

    Two intervals that do not meet are a cautious test: each is of a single path, and either end is exceeded in 2.5 % of draws. But the
    best of many rows is also the luckiest of them.
    """
    ranked = ranked_rows(rows)
    made = list[Contest]()
    for nfe in dict.fromkeys(row.nfe for row in ranked):
        noisy, plain = (next((row for row in ranked if row.nfe == nfe and row.stochastic is kind), None) for kind in (True, False))
        made.append(Contest(nfe, noisy, plain, _verdict(noisy, plain)))
    return made


def ranked_rows(rows: Sequence[NoiseRow]) -> list[NoiseRow]:
    """Return the rows that did not fail: fewer evaluations first, and of as many the least Frechet distance."""
    good = [(row.nfe, row.fd, number) for number, row in enumerate(rows) if row.fd is not None]
    return [rows[number] for *_, number in sorted(good)]


def _verdict(noisy: NoiseRow | None, plain: NoiseRow | None) -> Literal["noise", "no noise", "not apart"] | None:
    if noisy is None or plain is None or noisy.fd_ci is None or plain.fd_ci is None:
        return None
    if noisy.fd_ci[1] < plain.fd_ci[0]:
        return "noise"
    return "no noise" if plain.fd_ci[1] < noisy.fd_ci[0] else "not apart"
