"""Sample a network that somebody else trained, here a score network of galaxies (arXiv 2401.07313), with a sampler fitted to it.

The network is that of a package without a licence, so it is not part of this repository: pip install --no-deps galaxygrad==0.1.5
"""

import sys
from pathlib import Path

import fewstep

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.foreign_networks import INSTALL, load, place  # noqa: E402 - the reader of its weights


def main() -> None:
    model = load("hsc-32")  # a network that answers the score, the law VPLinear(10, 10), the network's time 10 t, and a shape
    config = fewstep.FitConfig(budget=3000)  # network evaluations in all, counted singly
    sampler = fewstep.fit(model, nfe=5, config=config, out="fitted-galaxies")[5]
    ours, by_hand = sampler.card["rmse"]
    print(f"5 evaluations: error {ours:.4f}; of {sampler.card['best_hand_made']}, the best of some by hand, {by_hand:.4f}")
    galaxies = fewstep.sample(model, sampler, seeds=range(4))
    print(f"{len(galaxies)} galaxies of {tuple(galaxies.shape[1:])} by the network of galaxygrad")


if __name__ == "__main__":
    if place("hsc-32") is None:
        print(f"nothing to sample, since its weights are not here: {INSTALL}")
    else:
        main()
