"""The temporal layer: its forms against sums written out by hand, what reads what, and that nothing in it is dead."""

import math

import pytest
import torch
from torch import Tensor

from fewstep import ModelError
from fewstep.models.networks.temporal_conv import FORMS, TemporalConv

SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (4, 2), (4, 3), (5, 3), (7, 4), (8, 3), (8, 5)]  # slots, modes
EXACT, SINGLE = 1e-10, 1e-5  # float64, float32; numbers of order 1
BRAIN = 0.1  # bfloat16: 2^-8 of numbers up to about 10
CHANNELS = 3


def made(slots: int, modes: int, form: str, dtype: torch.dtype = torch.float64) -> TemporalConv:
    """A layer whose gate is open; the same numbers for all forms."""
    torch.manual_seed(10 * slots + modes)
    layer = TemporalConv(CHANNELS, slots, modes, form).to(dtype).requires_grad_(False)
    layer.gate.normal_()
    return layer


def features(slots: int, *places: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(slots)
    return torch.randn(batch, slots, CHANNELS, *places, generator=generator, dtype=torch.float64).to(dtype)


def branch(layer: TemporalConv, h: Tensor) -> Tensor:
    """The layer's ``y``: what it adds, before the gate and the LeakyReLU, both undone."""
    layer.gate.fill_(1)
    added = layer(h) - h
    return torch.where(added > 0, added, added / 0.01)


def by_fft(layer: TemporalConv, h: Tensor) -> Tensor:
    """``y`` of ``h [B, T, C]`` as in the paper, frequency by frequency."""
    turns = iter([] if layer.imag is None else layer.imag)
    spectrum, out = torch.fft.rfft(h, dim=1), torch.zeros(len(h), h.shape[1] // 2 + 1, CHANNELS, dtype=torch.complex128)
    for m in range(layer.modes):
        imag = torch.zeros_like(layer.real[m]) if m == 0 or 2 * m == layer.slots else next(turns)
        if m < spectrum.shape[1]:
            out[:, m] = spectrum[:, m] @ torch.complex(layer.real[m], imag)
    return torch.fft.irfft(out, n=h.shape[1], dim=1)


def by_sum(layer: TemporalConv, h: Tensor, reads: object) -> Tensor:
    """``y_k = sum_j h_j M_{(k-j) mod T}`` of ``h [B, T, C]`` over those ``j`` that slot ``k`` reads."""
    total, count = layer.slots, h.shape[1]
    y = torch.zeros_like(h)
    for k in range(count):
        for j in (j for j in range(count) if reads(j, k)):
            matrix, turns = layer.real[0].clone(), iter([] if layer.imag is None else layer.imag)
            for m in range(1, layer.modes):
                angle = 2 * math.pi * m * (k - j) / total
                if 2 * m == total:
                    matrix += layer.real[m] * math.cos(angle)
                else:
                    matrix += 2 * (layer.real[m] * math.cos(angle) - next(turns) * math.sin(angle))
            y[:, k] += h[:, j] @ matrix / total
    return y


@pytest.mark.parametrize(("slots", "modes"), SIZES)
def test_forms_that_say_the_same_are_equal_for_all_numbers_of_slots(slots: int, modes: int) -> None:
    for dtype, close in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        fft, real = made(slots, modes, "fft", dtype), made(slots, modes, "real", dtype)
        for count in range(1, slots + 1):
            h = features(count, 2, 3, dtype=dtype)
            assert (out := fft(h)).dtype == dtype and float((out - h).abs().max()) > 0.01
            torch.testing.assert_close(real(h), out, rtol=close, atol=close)


@pytest.mark.parametrize(("slots", "modes"), [(4, 2), (4, 3), (2, 2), (7, 4)])
def test_forms_that_say_the_same_have_the_same_gradients(slots: int, modes: int) -> None:
    grads = []
    for form in ("fft", "real"):
        layer, h = made(slots, modes, form).requires_grad_(True), features(slots, 2).requires_grad_(True)
        layer(h).square().sum().backward()
        grads.append([h.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("slots", "modes"), SIZES)
@pytest.mark.parametrize("form", ["fft", "real"])
@pytest.mark.every(3, 2)
def test_circular_forms_are_the_papers_and_a_circulant_sum(form: str, slots: int, modes: int) -> None:
    layer = made(slots, modes, form)
    for count in range(1, slots + 1):
        torch.testing.assert_close(branch(layer, h := features(count)), by_fft(layer, h), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(branch(layer, h), by_sum(layer, h, lambda j, k: True), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("slots", "modes"), SIZES)
@pytest.mark.every(3, 2)
def test_one_way_is_the_circulant_sum_without_what_comes_earlier(slots: int, modes: int) -> None:
    layer = made(slots, modes, "one-way")
    torch.testing.assert_close(branch(layer, h := features(slots)), by_sum(layer, h, lambda j, k: j >= k), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", ["fft", "real"])
@pytest.mark.parametrize(("slots", "modes"), SIZES)
@pytest.mark.every(5, 2)
def test_what_does_not_change_is_mapped_by_the_matrix_of_frequency_0(form: str, slots: int, modes: int) -> None:
    layer = made(slots, modes, form)
    for count in {1, slots}:
        h = features(1).expand(-1, count, -1)
        torch.testing.assert_close(branch(layer, h), h @ layer.real[0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", ["fft", "real"])
@pytest.mark.parametrize(("slots", "modes"), [(2, 2), (4, 2), (4, 3), (7, 4)])
def test_circular_forms_turn_with_their_input(form: str, slots: int, modes: int) -> None:
    layer, h = made(slots, modes, form), features(slots, 2)
    for by in range(1, slots):
        torch.testing.assert_close(layer(h.roll(by, 1)), layer(h).roll(by, 1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("slots", "modes"), [(2, 2), (4, 2), (4, 3), (7, 4)])
def test_one_way_slots_never_read_earlier_ones(slots: int, modes: int) -> None:
    layer, h = made(slots, modes, "one-way"), features(slots, 2)
    whole = layer(h)
    for k in range(slots):
        other = h.clone()
        other[:, k] += 1
        changed = (layer(other) != whole).flatten(2).any(2).any(0)
        assert bool(changed[: k + 1].all()) and not bool(changed[k + 1 :].any())


@pytest.mark.parametrize(("slots", "modes"), SIZES)
@pytest.mark.every(3, 2)
def test_one_way_slots_are_the_same_without_those_before_them(slots: int, modes: int) -> None:
    layer, h = made(slots, modes, "one-way"), features(slots, 2)
    for k in range(slots):
        torch.testing.assert_close(layer(h[:, k:]), layer(h)[:, k:], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_layer_is_the_identity_to_the_bit(form: str) -> None:
    for slots, modes in SIZES:
        layer = TemporalConv(CHANNELS, slots, modes, form)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert torch.equal(layer(h := 1e3 * features(slots, 2, dtype=dtype)), h) and layer(h).dtype == dtype


@pytest.mark.parametrize(("slots", "modes"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (5, 3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.every(5, 2)
def test_one_step_wakes_every_frequency_of_every_parameter(form: str, slots: int, modes: int) -> None:
    torch.manual_seed(0)
    layer, h = TemporalConv(CHANNELS, slots, modes, form), features(slots, 4, dtype=torch.float32)
    optimizer, wanted = torch.optim.SGD(layer.parameters(), lr=0.1), torch.randn(h.shape)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(h) - wanted).square().mean().backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert bool((parameter.grad.reshape(len(parameter), -1).abs().amax(1) > 1e-6).all()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("places", [(), (5,), (2, 3)])
def test_places_and_samples_do_not_meet(form: str, places: tuple[int, ...]) -> None:
    layer, h = made(4, 2, form), features(4, *places)
    out = layer(h)
    assert out.shape == h.shape
    flat, one = h.reshape(2, 4, CHANNELS, -1), out.reshape(2, 4, CHANNELS, -1)
    for b in range(2):
        for p in range(flat.shape[3]):
            torch.testing.assert_close(layer(flat[b : b + 1, ..., p]), one[b : b + 1, ..., p], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_the_gate_weighs_what_each_channel_gets(form: str) -> None:
    layer, h = made(4, 3, form), features(4, 2)
    layer.gate.copy_(torch.tensor([0.0, 1.0, -2.0]))
    whole = branch(made(4, 3, form), h)
    wanted = h + layer.gate[:, None] * torch.where(whole > 0, whole, 0.01 * whole)
    torch.testing.assert_close(layer(h), wanted, rtol=EXACT, atol=EXACT)
    assert torch.equal(layer(h)[:, :, 0], h[:, :, 0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("also", ["input", "layer", "autocast"])
@pytest.mark.every(4, 2)
def test_half_precision_gives_nearly_the_same(form: str, dtype: torch.dtype, also: str) -> None:
    layer, h = made(4, 3, form, torch.float32), features(4, 2, 3, dtype=torch.float32)
    wanted = layer(h)
    if also == "autocast":
        with torch.autocast("cpu", dtype):
            out = layer(h)
    else:
        out = (layer.to(dtype) if also == "layer" else layer)(h.to(dtype))
        assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=BRAIN)


def test_slots_modes_and_forms_that_do_not_exist_are_refused() -> None:
    for slots, modes in ((0, 1), (1, 2), (4, 0), (4, -1), (4, 4), (5, 4)):
        with pytest.raises(ModelError, match=f"{slots} slots have {slots // 2 + 1} temporal frequencies"):
            TemporalConv(CHANNELS, slots, modes)
    with pytest.raises(ModelError, match="form of the temporal layer"):
        TemporalConv(CHANNELS, 4, 2, "oneway")
