"""Deblur held-out pictures whose kernel nobody knows: three kinds of 5 x 5 kernels, 1, 4 or 16 pictures of one kernel.

    python benchmarks/blind_study.py --out benchmarks/results/blind_study.json
    python benchmarks/blind_study.py --galaxies --out benchmarks/results/blind_galaxies.json

64 test pictures (16 where each has a kernel of its own), ``cifar10-16`` without its labels, noise 0.02, 2 samples of each picture; the
figure is the PSNR of one sample. Each group of pictures has a kernel of its own: Gaussian of 0.7 to 1.3 pixels, motion along a line of 5
pixels, or numbers at random. A blind kernel is known up to a shift, so ``psnr`` is that after the best shift of the group by up to 2
pixels, the same for every method, and ``psnr_as_it_lies`` that without one. It goes on where it was stopped. About an hour on two
cores.

``--galaxies``: draws of a score network of galaxies (see `foreign_networks`) for pictures, which a telescope blurs by its point-spread
function: Moffat's or a Gaussian of 7 x 7 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fewstep
from fewstep.data.images import load_images
from fewstep.inverse.blind import BlindConfig, deblur_blind, deblur_known
from fewstep.inverse.error_spectra import ErrorSpectra, error_spectra
from fewstep.inverse.kernel_fit import recentred
from fewstep.inverse.measurements import CircularBlur
from fewstep.inverse.posterior import sample_posterior
from fewstep.runtime.artifact import write_whole

SIZE, NOISE, PICTURES, SINGLE, SAMPLES, SHIFT = 5, 0.02, 64, 16, 2, 2  # SINGLE pictures have a kernel each, as 64 would take an hour
KINDS, COUNTS = ("gaussian", "motion", "random"), (4, 16, 1)
METHODS = {"slow EM": "slow", "fast EM": "fast", "by evidence": "evidence"}


def gaussian(deviation: float, size: int = SIZE) -> Tensor:
    y, x = _places(size)
    return _normal(torch.exp(-(x**2 + y**2) / (2 * deviation**2)))


def motion(angle: float) -> Tensor:
    """Return a line through the middle, from border to border."""
    kernel, middle, reach = torch.zeros(SIZE, SIZE), SIZE // 2, SIZE // 2 / max(abs(math.sin(angle)), abs(math.cos(angle)))
    for along in torch.linspace(-reach, reach, 41).tolist():
        y, x = middle + along * math.sin(angle), middle + along * math.cos(angle)
        for row, column in product(range(SIZE), range(SIZE)):
            kernel[row, column] += max(0.0, 1 - abs(row - y)) * max(0.0, 1 - abs(column - x))
    return _normal(kernel)


def moffat(width: float, beta: float = 2.5, size: int = 7) -> Tensor:
    """Return Moffat's point-spread function of a full width at half maximum."""
    y, x = _places(size)
    core = width / (2 * math.sqrt(2 ** (1 / beta) - 1))
    return _normal((1 + (x**2 + y**2) / core**2) ** -beta)


def kernel_of(kind: str, number: int) -> Tensor:
    """Return the kernel of a group; the first of each kind are a Gaussian of 0.9 pixels and the diagonal."""
    generator = torch.Generator().manual_seed(1000 + number)
    part = float(torch.rand((), generator=generator))
    if kind == "gaussian":
        return gaussian(0.9 if number == 0 else 0.7 + 0.6 * part)
    if kind == "motion":
        return motion(math.pi / 4 if number == 0 else math.pi * part)
    return recentred(_normal(torch.rand(SIZE, SIZE, generator=generator) ** 3))


def _places(size: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(torch.arange(size) - size // 2.0, torch.arange(size) - size // 2.0, indexing="ij")


def _normal(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()


def psnr(x: Tensor, truth: Tensor, span: float) -> float:
    """Return the mean PSNR of ``x [P, S, *D]``."""
    error = (x - truth[:, None]).square().flatten(2).mean(2)
    return float((10 * torch.log10(span**2 / error)).mean())


def shifted_psnr(x: Tensor, truth: Tensor, span: float) -> float:
    """Return the mean PSNR after the best shift of all pictures together."""
    shifts = range(-SHIFT, SHIFT + 1)
    return max(psnr(x.roll((i, j), (-2, -1)), truth, span) for i, j in product(shifts, shifts))


def kernel_error(found: Tensor, truth: Tensor) -> float:
    """Return the L1 distance of two kernels after the best shift."""
    found, truth = (torch.nn.functional.pad(one, (SHIFT,) * 4) for one in (found, truth))
    shifts = range(-SHIFT, SHIFT + 1)
    return min(float((found.roll((i, j), (0, 1)) - truth).abs().sum()) for i, j in product(shifts, shifts))


class Group(NamedTuple):
    """Pictures that share a kernel."""

    truth: Tensor
    kernel: Tensor
    y: Tensor
    noise: float
    span: float  # of the values, for a PSNR
    clip: bool


@torch.no_grad()
def results(model: fewstep.Model, spectra: ErrorSpectra, group: Group, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what each way makes of a group."""
    count, kernel, y = len(group.y), group.kernel, group.y
    cond = None if model.null_label is None else torch.full((count,), model.null_label)
    seeds = range(10**6 * seed, 10**6 * seed + count * SAMPLES)

    def row(x: Tensor, found: Tensor, evaluations: int) -> dict[str, float]:
        x = x.clamp(-1, 1) if group.clip else x
        made = {"psnr": shifted_psnr(x, group.truth, group.span), "psnr_as_it_lies": psnr(x, group.truth, group.span)}
        return {**made, "kernel_error": kernel_error(found, kernel), "evaluations": evaluations}

    nothing = torch.zeros_like(kernel)
    nothing[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1
    yield "blurred", row(y[:, None], nothing, 0)
    config = BlindConfig()
    known = deblur_known(model, y, group.noise, kernel, samples=SAMPLES, seeds=seeds, cond=cond, spectra=spectra)
    yield "known kernel", row(known, kernel, SAMPLES * config.final)
    sampler = fewstep.Sampler.build("ddim", "karras", model.schedule, nfe=10)
    start = fewstep.start_noise(sampler.tableau.nodes, seeds, y.shape[1:])
    many = None if cond is None else cond.repeat_interleave(SAMPLES)
    blur, each = CircularBlur(kernel), y.repeat_interleave(SAMPLES, 0)
    by = sample_posterior(model, sampler, start, blur, each, group.noise, many, method=f"projection:spread={spectra.spread}")
    yield "known kernel, projection", row(by.reshape(count, SAMPLES, *y.shape[1:]), kernel, SAMPLES * sampler.nfe)
    for name, method in METHODS.items():
        made: Any = method
        found = deblur_blind(model, y, group.noise, kernel.shape[-1], method=made, samples=SAMPLES, seeds=seeds, cond=cond, spectra=spectra)
        yield name, row(found.x, found.kernel, found.evaluations)


def rows_of(facts: dict[str, Any], groups: list[list[tuple[str, dict[str, float]]]]) -> list[dict[str, Any]]:
    """Return a row for each way, with means over groups and the share of groups that it makes worse than they were."""
    rows: list[dict[str, Any]] = []
    for way, (name, first) in enumerate(groups[0]):
        of_way = [group[way][1] for group in groups]
        means = {key: round(sum(one[key] for one in of_way) / len(groups), 3) for key in first}
        worse = sum(one["psnr"] < group[0][1]["psnr"] for one, group in zip(of_way, groups, strict=True)) / len(groups)
        rows.append({**facts, "method": name, **means, "worse": round(worse, 3)})
    return rows


def cifar(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the facts of each part of the study, with a function that gives its groups' results."""
    model, pictures = fewstep.load_model(args.model), load_images(args.pictures).x[:PICTURES]
    spectra = error_spectra(model, model.need_shape(), torch.tensor([model.null_label]))

    def groups(kind: str, count: int, seed: int) -> list[Any]:
        found: list[Any] = []
        for number in range((PICTURES if count > 1 else SINGLE) // count):
            truth, kernel = pictures[number * count : (number + 1) * count], kernel_of(kind, number)
            noise = fewstep.seeded_noise(range(number * count, (number + 1) * count), truth.shape[1:], stream=77 + seed)
            group = Group(truth, kernel, CircularBlur(kernel)(truth) + NOISE * noise, NOISE, 2.0, True)
            found.append(list(results(model, spectra, group, seed)))
        return found

    for seed in range(args.seeds):
        for count in args.counts:
            for kind in KINDS:
                if count > 1 or seed == 0:
                    yield {"kernel": kind, "pictures": count, "seed": seed}, lambda k=kind, c=count, s=seed: groups(k, c, s)


def galaxies(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    import foreign_networks

    model = foreign_networks.load("hsc-32")
    drawn = fewstep.Sampler.build("unipc-2", "karras", model.schedule, nfe=20)
    spectra = error_spectra(model, model.need_shape(), seed=10**5)
    with torch.no_grad():
        pictures = fewstep.sample(model, drawn, fewstep.start_noise(drawn.tableau.nodes, range(16), model.need_shape()))
    span, noise = float(pictures.amax() - pictures.amin()), 0.05 * spectra.spread

    def groups(kernel: Tensor, count: int) -> list[Any]:
        found: list[Any] = []
        for number in range(len(pictures) // count):
            truth = pictures[number * count : (number + 1) * count]
            n = fewstep.seeded_noise(range(number * count, (number + 1) * count), truth.shape[1:], stream=77)
            group = Group(truth, kernel, CircularBlur(kernel)(truth) + noise * n, noise, span, False)
            found.append(list(results(model, spectra, group, 0)))
        return found

    for (name, kernel), count in product(
        {"moffat 2.5": moffat(2.5), "moffat 3.5": moffat(3.5), "gaussian 1.2": gaussian(1.2, 7)}.items(), (1, 4, 8)
    ):
        yield {"kernel": name, "pictures": count, "seed": 0}, lambda k=kernel, c=count: groups(k, c)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--galaxies", action="store_true")
    parser.add_argument("--model", default="assets/cifar10-16")
    parser.add_argument("--pictures", default="runs/cifar10/cifar10-16-test.npz")
    parser.add_argument("--seeds", type=int, default=1, help="of the noise; single pictures have one")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="pictures of one kernel")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    command = "python benchmarks/blind_study.py" + (" --galaxies" if args.galaxies else "")
    for facts, make in (galaxies if args.galaxies else cifar)(args):
        if any(all(row[key] == value for key, value in facts.items()) for row in rows):
            continue
        rows += rows_of(facts, make())
        for row in rows[-6:]:
            print(json.dumps(row), flush=True)
        write_whole(args.out, (json.dumps({"command": command, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
