"""The cube and the kernel of reflected noise: both forms, the walls, the fold, and what cannot be."""

import math

import pytest
import torch
from torch import Tensor

from fewstep import Cube, FewstepError, ModelError, VarianceExploding
from fewstep.core.domain import _far, _near, check_unbounded, domain_of, mirror_mean
from fewstep.models.reflected import Reflected

CUBE, OTHER = Cube(), Cube(0.5, 3.5)
ROUNDING = 1e-12  # of float64, as the softmax of 26 images and the sum of 20 cosines leave it
NUM = 4000


def pairs(cube: Cube = CUBE, low: float = 0.3, high: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """States with the images that they came from, and the noise levels, uniform in their logarithm."""
    draw, size = torch.Generator().manual_seed(0), cube.edge / 2
    x0 = cube.low + cube.edge * torch.rand(NUM, generator=draw, dtype=torch.float64)
    sigma = size * low * (high / low) ** torch.rand(NUM, generator=draw, dtype=torch.float64)
    return cube.fold(x0 + sigma * torch.randn(NUM, generator=draw, dtype=torch.float64))[0], x0, sigma


@pytest.mark.parametrize("cube", [CUBE, OTHER])
def test_the_two_forms_of_the_kernel_are_one_function(cube: Cube) -> None:
    x, x0, sigma = pairs(cube)
    torch.testing.assert_close(_near(x, x0, sigma, cube, 12), _far(x, x0, sigma, cube, 60), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("cube", [CUBE, OTHER])
def test_each_form_has_terms_enough_where_it_is_taken(cube: Cube) -> None:
    x, x0, sigma = pairs(cube)
    other = torch.where(sigma < cube.edge / 2, _far(x, x0, sigma, cube, 60), _near(x, x0, sigma, cube, 12))
    torch.testing.assert_close(mirror_mean(x, x0, sigma, cube), other, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.5, 3.0])
def test_the_kernel_is_tangential_at_the_walls(sigma: float) -> None:
    _, x0, _ = pairs()
    for wall in (CUBE.low, CUBE.high):
        made = mirror_mean(torch.full_like(x0, wall), x0, torch.tensor(sigma, dtype=torch.float64), CUBE)
        torch.testing.assert_close(made, torch.full_like(x0, wall), rtol=0, atol=max(ROUNDING, 1e-13 / sigma))  # an image's own rounding


def test_the_kernel_is_the_image_of_its_law_by_a_difference() -> None:
    """``D = x + sigma^2 d/dx log p``, with the density of a folded normal summed by hand."""
    x, x0, sigma = pairs(low=0.1, high=2.0)

    def log_density(x: Tensor) -> Tensor:
        images = torch.stack([x0 + 4 * k for k in range(-9, 10)] + [2 - x0 + 4 * k for k in range(-9, 10)])
        return torch.logsumexp(-(((x - images) / sigma) ** 2) / 2, 0)

    h = 1e-6
    slope = (log_density(x + h) - log_density(x - h)) / (2 * h)
    torch.testing.assert_close(mirror_mean(x, x0, sigma, CUBE), x + sigma**2 * slope, rtol=0, atol=1e-6)


def test_the_kernel_takes_levels_by_batch_and_has_a_gradient() -> None:
    x, x0, _ = (value[:24].reshape(4, 2, 3) for value in pairs())
    sigma = torch.tensor([0.05, 2.0, 0.9, 1.1], dtype=torch.float64)
    together = mirror_mean(x, x0, sigma, CUBE)
    alone = torch.cat([mirror_mean(x[k : k + 1], x0[k : k + 1], sigma[k], CUBE) for k in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x, x0: mirror_mean(x, x0, sigma, CUBE), (x.requires_grad_(), x0.clone().requires_grad_()))


def test_the_kernel_is_the_clean_image_without_noise_and_the_state_with_much() -> None:
    x, x0, _ = pairs()
    near = CUBE.fold(x0 + 0.001 * torch.sign(x))[0]
    small, large = (mirror_mean(a, x0, torch.tensor(level, dtype=torch.float64), CUBE) for a, level in ((near, 0.001), (x, 4.0)))
    inner = x0.abs() < 0.99  # at a wall an image and its mirror image are one
    assert (small - x0)[inner].abs().max() < 1e-9 and (large - x).abs().max() < 1e-5


@pytest.mark.parametrize("cube", [CUBE, OTHER])
def test_the_fold_is_into_the_cube_idempotent_and_m_its_derivative(cube: Cube) -> None:
    x = 9 * torch.randn(NUM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    folded, m = cube.fold(x)
    assert cube.low <= float(folded.min()) and float(folded.max()) <= cube.high and set(m.tolist()) == {1.0, -1.0}
    again, same = cube.fold(folded)
    assert torch.equal(again, folded) and bool((same == 1).all())
    h, inner = 1e-7, (folded - cube.low > 1e-6) & (cube.high - folded > 1e-6)
    slope = (cube.fold(x + h)[0] - cube.fold(x - h)[0]) / (2 * h)
    torch.testing.assert_close(slope[inner], m[inner], rtol=0, atol=1e-6)
    single = folded.float().clamp(cube.low, cube.high)
    assert torch.equal(cube.fold(single)[0], single)  # to the bit, in float32 too


def test_much_noise_folds_to_the_uniform_law() -> None:
    """By the cosine moments of its density, ``exp(-(n pi/2)^2 sigma^2/2) cos(n pi/2 (x0 + 1))``: their sum bounds the distance."""
    sigma = 3.0
    moments = [math.exp(-((n * math.pi / 2) ** 2) * sigma**2 / 2) for n in range(1, 9)]
    assert moments[0] == pytest.approx(math.exp(-(math.pi**2) * 9 / 8)) and sum(moments) < 1e-4
    made = CUBE.fold(sigma * torch.randn(200_000, generator=torch.Generator().manual_seed(2)))[0]
    for n in range(1, 9):
        assert abs(float(torch.cos(n * math.pi / 2 * (made.double() + 1)).mean()) - moments[n - 1] * math.cos(n * math.pi / 2)) < 0.008
    places = made.sort().values.double()
    assert float(((places + 1) / 2 - torch.linspace(0, 1, len(places), dtype=torch.float64)).abs().max()) < 0.005  # of 200,000 draws


def test_the_share_outside_counts_what_is_beyond_a_wall() -> None:
    assert CUBE.outside(torch.tensor([-1.0, 1.0, 0.0, 1.1])) == 0.25
    assert CUBE.outside(torch.tensor([1 + 1e-7, -1.0])) == 0  # rounding


def test_images_beyond_the_cube_are_named() -> None:
    CUBE.check(torch.tensor([-1.0, 1 + 5e-7]), "the images")
    with pytest.raises(FewstepError, match=r"the images of mine lie in \[0, 255\], the cube is \[-1, 1\]: scale them"):
        CUBE.check(torch.tensor([0.0, 255.0]), "the images of mine")


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, -1.0), (-math.inf, 1.0)])
def test_walls_that_hold_nothing_are_refused(low: float, high: float) -> None:
    with pytest.raises(ModelError, match="finite walls with low < high"):
        Cube(low, high)


def test_a_wall_is_a_number() -> None:
    with pytest.raises(ModelError, match="low of a cube is a number, got 'left'"):
        Cube("left")  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match="did you mean low"):
        Cube(lwo=-1)  # type: ignore[call-arg]


def test_a_domain_is_found_and_refused_where_it_cannot_be() -> None:
    class Plain:
        schedule = VarianceExploding(0.01, 3.0)

        def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return x

    check_unbounded(Plain(), "a taker", "never mind")
    assert domain_of(Plain()) is None and domain_of(Reflected(Plain())) == CUBE
    with pytest.raises(ModelError, match="a taker is not for a reflected model.*never mind"):
        check_unbounded(Reflected(Plain()), "a taker", "never mind")
