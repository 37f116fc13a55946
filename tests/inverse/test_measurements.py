"""Operators: their transposes and solutions against the matrices that they stand for, and what they refuse."""

import pytest
import torch

from fewstep import ModelError
from fewstep.inverse.measurements import (
    Average,
    CircularBlur,
    Clip,
    Compose,
    Diagonal,
    Grayscale,
    Mask,
    Matrix,
    Measurement,
    Nonlinear,
    checked_noise,
    measurement_of,
)

SHAPE = (3, 8, 8)
ROUNDING = 1e-9  # of float64, through a Fourier transform or a few hundred steps of conjugate gradients


def kernel(size: int = 5) -> torch.Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / size**2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain(Measurement):
    """An operator without a closed form."""

    def __call__(self, x0: torch.Tensor) -> torch.Tensor:
        return x0[:, :1, ::2] + 2 * x0[:, 1:2, 1::2]

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        x = y.new_zeros(len(y), *SHAPE)
        x[:, :1, ::2], x[:, 1:2, 1::2] = y, 2 * y
        return x


class Physics:
    """The protocol of another library's linear operators: blocks averaged."""

    class noise_model:  # noqa: N801 - the other library's name
        sigma = torch.tensor(0.05)

    def __init__(self) -> None:
        self.own, self.calls = Average(2), list[str]()

    def A(self, x: torch.Tensor) -> torch.Tensor:  # noqa: N802
        return self.own(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        return self.own.transpose(y)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        self.calls.append("A_dagger")
        return 4 * self.own.transpose(y)

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return argmin gamma/2 |A x - y|^2 + |x - z|^2/2, for A A^T = I/4."""
        self.calls.append("prox_l2")
        return z + gamma * self.own.transpose(y - self.own(z)) / (1 + gamma / 4)


MASK = (draw(1, 8, 8, seed=4) > 0).double()
OPERATORS: dict[str, Measurement] = {
    "mask": Mask(MASK),
    "diagonal": Diagonal(draw(*SHAPE, seed=5)),
    "average": Average(2),
    "blur": CircularBlur(kernel()),
    "blur of each": CircularBlur(torch.stack([kernel(), kernel().flip(0)])),
    "even side": CircularBlur(kernel(3)),
    "gray": Grayscale(),
    "matrix": Matrix(draw(20, 192, seed=6), SHAPE),
    "tall matrix": Matrix(draw(200, 192, seed=6), SHAPE),
    "compose": Compose(Average(2), CircularBlur(kernel())),
    "composed with @": Mask(MASK) @ CircularBlur(kernel()),
    "plain": Plain(),
    "physics": measurement_of(Physics()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_transpose_is_one(name: str) -> None:
    a, x = OPERATORS[name], draw(2, *SHAPE)
    y = draw(*a(x).shape, seed=1)
    one, two = (a(x) * y).flatten(1).sum(1), (x * a.transpose(y)).flatten(1).sum(1)
    torch.testing.assert_close(one, two, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("r2", [0.3, torch.tensor([0.3, 2.0], dtype=torch.float64)], ids=["one", "of each"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.every(3, 2)
def test_solve_inverts(name: str, r2: float | torch.Tensor) -> None:
    a, noise = OPERATORS[name], 0.1
    r = draw(*a(draw(2, *SHAPE)).shape, seed=1)
    u = a.solve(r, r2, noise)
    gain = torch.as_tensor(r2, dtype=torch.float64).reshape(-1, *(1,) * (r.ndim - 1))
    torch.testing.assert_close(gain * a(a.transpose(u)) + noise**2 * u, r, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.lift(r, r2, noise), a.transpose(u), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_without_noise_the_image_explains_the_measurement(name: str) -> None:
    """The pseudo-inverse: the shortest image that fits, and nothing along what the operator does not see."""
    a, x = OPERATORS[name], draw(2, *SHAPE)
    y = a(x)
    found = a.lift(y, 1.0, 0.0)
    torch.testing.assert_close(a(found), y, rtol=1e-4, atol=1e-4)
    again = a.lift(a(found), 1.0, 0.0)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.transpose(a.solve(y, 1.0, 0.0)), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", [0.1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("rows", [5, 40])
def test_a_matrix_is_solved_in_single_precision_whatever_the_noise(noise: float, rows: int) -> None:
    matrix, r = draw(rows, 16, seed=3), draw(3, rows)
    exact = matrix.T @ torch.linalg.solve(0.25 * matrix @ matrix.T + noise**2 * torch.eye(rows), r.T)
    found = Matrix(matrix.float(), (1, 4, 4)).lift(r.float(), 0.25, noise)
    if rows < 16 or noise > 1e-3:  # beyond, the reference itself is ill-conditioned
        assert float((found.flatten(1).double() - exact.T).norm() / exact.norm()) < 1e-4
    assert float(found.abs().max()) < 1e3


def test_a_blur_is_a_convolution() -> None:
    x, k = draw(1, 1, 8, 8), kernel(3)
    direct = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), k.flip(0, 1)[None, None])
    torch.testing.assert_close(CircularBlur(k)(x), direct, rtol=ROUNDING, atol=ROUNDING)


def test_physics_answers_by_its_own_formulas() -> None:
    physics = Physics()
    a, r = measurement_of(physics), draw(2, 3, 4, 4)
    torch.testing.assert_close(a.lift(r, 0.3, 0.1), Average(2).lift(r, 0.3, 0.1))
    torch.testing.assert_close(a.lift(r, 0.3, 0.0), Average(2).lift(r, 0.3, 0.0))
    assert physics.calls == ["prox_l2", "A_dagger"]
    assert checked_noise(None, physics) == pytest.approx(0.05)
    assert checked_noise(0.2, physics) == 0.2


def test_the_derivative_of_a_function() -> None:
    function = Nonlinear(lambda x: (x**2).sum(1, keepdim=True))
    x, v = draw(2, *SHAPE), draw(2, *SHAPE, seed=1)
    a = function.at(x, function(x), 0.1)
    torch.testing.assert_close(a(v), (2 * x * v).sum(1, keepdim=True))
    u = draw(2, 1, 8, 8, seed=2)
    torch.testing.assert_close(a.transpose(u), 2 * x * u)
    chained = Compose(Average(2), function).at(x, Average(2)(function(x)), 0.1)
    torch.testing.assert_close(chained(v), Average(2)((2 * x * v).sum(1, keepdim=True)))


def test_a_camera_keeps_the_slope_of_pixels_on_the_wrong_side() -> None:
    x, y = torch.tensor([[0.2, 0.9, 0.9, -0.9, -0.9]]), torch.tensor([[0.4, 0.0, 1.05, 0.0, -1.0]])
    a = Clip(2.0).at(x, y, 0.05)
    assert a(torch.ones_like(x)).tolist() == [[2, 2, 0, 2, 0]]


def test_an_object_with_a_alone_is_nonlinear() -> None:
    class OneWay:
        def A(self, x: torch.Tensor) -> torch.Tensor:  # noqa: N802
            return x**3

    assert isinstance(measurement_of(OneWay()), Nonlinear)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mask(torch.tensor([0.5])), "zeros"),
        (lambda: Mask([1]), "zeros"),
        (lambda: Average(0), "whole number"),
        (lambda: Average(1.5), "whole number"),
        (lambda: Average(3)(torch.zeros(1, 1, 8, 8)), "blocks of 3 x 3"),
        (lambda: Mask(torch.ones(4, 4))(torch.zeros(1, 1, 8, 8)), "does not fit"),
        (lambda: Mask(torch.ones(1, 3, 8, 8))(torch.zeros(1, 1, 8, 8)), "does not fit"),
        (lambda: CircularBlur(torch.ones(4, 5)), "odd sides"),
        (lambda: CircularBlur(torch.zeros(3, 3)), "not all 0"),
        (lambda: CircularBlur(torch.full((3, 3), float("nan"))), "finite"),
        (lambda: CircularBlur(torch.ones(9, 9))(torch.zeros(1, 1, 8, 8)), "larger than"),
        (lambda: Grayscale()(torch.zeros(1, 1, 8, 8)), "3 weights"),
        (lambda: Grayscale((0.0, 0.0)), "not all 0"),
        (lambda: Grayscale(0.5), "weights are those of the channels"),
        (lambda: Matrix(torch.eye(4), 4), "shape is that of an image"),
        (lambda: Matrix(torch.eye(4) * 1j), "real numbers"),
        (lambda: Matrix(torch.zeros(0, 4)), "finite real numbers"),
        (lambda: Mask(torch.zeros(0)), "zeros"),
        (lambda: Matrix(torch.ones(3)), r"\[m, n\]"),
        (lambda: Matrix(torch.ones(3, 4), (5,)), "does not fit"),
        (lambda: Matrix(torch.eye(4))(torch.zeros(1, 2, 2)), "shape="),
        (lambda: Nonlinear(3), "a function"),
        (lambda: Nonlinear(lambda x: torch.zeros(2)).at(torch.zeros(2, 1), torch.zeros(2), 0.0), "cannot be differentiated"),
        (lambda: Nonlinear(abs).transpose(torch.zeros(1)), "near an image"),
        (lambda: Clip(0.0), "not 0"),
        (lambda: measurement_of(Average), "the class Average"),
        (lambda: measurement_of("blur"), "a str"),
        (lambda: checked_noise(None, Average(2)), "noise=0.05"),
        (lambda: checked_noise(-1.0, Average(2)), "from 0"),
        (lambda: checked_noise(float("inf"), Average(2)), "finite"),
        (lambda: checked_noise("much", Average(2)), "number"),
    ],
)
@pytest.mark.every(2)
def test_refusals(make, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        make()
