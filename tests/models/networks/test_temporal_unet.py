"""DSNO's operator on small networks with random weights: where slots meet, what they cost, and that the network stays itself."""

import copy
import functools
from functools import partial

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from tests.problems import ATTENTION_UNET
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep import ModelError
from fewstep.models.networks.calls import unet_call
from fewstep.models.networks.temporal_unet import Mixing, TemporalUNet

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
THREE = {"block_out_channels": (8, 8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
SKIP = {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D")}
NETWORKS = {
    "attention": {},
    "classes": {"num_class_embeds": 3},
    "plain": PLAIN | {"add_attention": False},
    "three": THREE | {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2},
    "resnet": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet-plain": PLAIN | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "no-middle": {"mid_block_type": None},
    "fourier": {"time_embedding_type": "fourier", "num_class_embeds": 3},
    "skip": SKIP | {"in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32)},  # 32 groups are built in
}
# what temporal layers follow, by hand; of the three levels the lower two are inner, of two the lower one
AFTER = {
    "attention": "d0.r0 d1.a0 m.a0 u0.a0 u0.a1 u1.r0 u1.r1",
    "plain": "d0.r0 d1.r0 m.r0 u0.r0 u0.r1 u1.r0 u1.r1",
    "three": "d0.r0 d0.r1 d1.a0 d1.a1 d2.r0 d2.r1 m.a0 u0.r0 u0.r1 u0.r2 u1.a0 u1.a1 u1.a2 u2.r0 u2.r1 u2.r2",
    "resnet": "d0.r0 d1.a0 m.a0 u0.a0 u0.a1 u1.r0 u1.r1",
    "resnet-plain": "d0.r0 d1.r0 m.a0 u0.r0 u0.r1 u1.r0 u1.r1",
    "no-middle": "d0.r0 d1.a0 u0.a0 u0.a1 u1.r0 u1.r1",
    "skip": "d0.r0 d1.a0 m.a0 u0.r0 u0.a0 u1.r0 u1.r1",  # that attention comes after both residual blocks
}
WAYS = [("all", "input"), ("inner", "input"), ("inner", "inner")]
FORMS = ["none", "real", "fft", "one-way"]
MIXINGS = [Mixing(form, 2, *way) for form in FORMS for way in WAYS]
CLOSE = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # float32 through a network, states of order 1 to 100
BATCH, SLOTS, FEATURES = 2, 4, 5
TIME = torch.tensor([3.0, 2.0, 1.0, 0.5])


@functools.cache
def made(kind: str) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**ATTENTION_UNET, **NETWORKS[kind]}).eval().requires_grad_(False)


def network(kind: str = "attention") -> UNet2DModel:
    """A copy of its own, since an operator hangs hooks on it."""
    return copy.deepcopy(made(kind))


def stirred(operator: TemporalUNet) -> TemporalUNet:
    """As if trained: no new weight is where it started."""
    torch.manual_seed(1)
    for name, parameter in operator.named_parameters():
        if not name.startswith("unet."):
            parameter.data = 0.5 * torch.randn_like(parameter)
    return operator.requires_grad_(False)


def given(kind: str = "attention", batch: int = BATCH) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(2)
    x = torch.randn(batch, NETWORKS[kind].get("in_channels", 1), 8, 8)
    return x, torch.arange(batch) if "num_class_embeds" in NETWORKS[kind] else None


def features(slots: int = SLOTS) -> Tensor:
    return torch.randn(slots, FEATURES, generator=torch.Generator().manual_seed(3))


def alone(unet: UNet2DModel, x: Tensor, cond: Tensor | None, time: Tensor = TIME) -> Tensor:
    """The network's answers in all slots, ``[B, T, ...]``."""
    labels = None if cond is None else cond.repeat_interleave(len(time))
    return unet_call(unet, x.repeat_interleave(len(time), 0), time.repeat(len(x)), labels).unflatten(0, (len(x), -1))


def at(unet: UNet2DModel, place: str) -> nn.Module:
    block, inside = place.split(".")
    blocks = {"d": unet.down_blocks, "m": [unet.mid_block], "u": unet.up_blocks}[block[0]]
    chosen = blocks[int(block[1:] or 0)]
    return (chosen.resnets if inside[0] == "r" else chosen.attentions)[int(inside[1:])]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.every(9)
def test_a_new_operator_answers_what_the_network_alone_answers_to_the_bit(kind: str) -> None:
    x, cond = given(kind)
    wanted = alone(network(kind), x, cond)
    assert float((wanted[:, 0] - wanted[:, -1]).abs().max()) > 1e-3  # slots differ by their time
    for mixing in (Mixing("none"), Mixing(), Mixing("fft", 3), Mixing("one-way", 2, "inner"), Mixing("none", 2, "inner")):
        operator = TemporalUNet(network(kind), SLOTS, mixing, FEATURES)
        assert torch.equal(operator(x, TIME, cond, features()), wanted) and torch.equal(operator(x, TIME, cond), wanted)


@pytest.mark.parametrize("places", ["all", "inner"])
@pytest.mark.parametrize("kind", AFTER)
@pytest.mark.every(3)
def test_temporal_layers_follow_each_block_with_its_attention_and_one_is_in_the_middle(kind: str, places: str) -> None:
    outer = {"d0", f"u{len(network(kind).up_blocks) - 1}"} if places == "inner" else set()
    after = [place for place in AFTER[kind].split() if place.split(".")[0] not in outer]
    operator, by_hand = stirred(TemporalUNet(network(kind), SLOTS, Mixing("real", 2, places))), network(kind)
    assert len(operator.temporal) == len(after)
    for place, layer in zip(after, operator.temporal, strict=True):
        hook = lambda _, given, out, layer=layer: layer(out.reshape(BATCH, SLOTS, *out.shape[1:])).reshape(out.shape)  # noqa: E731
        at(by_hand, place).register_forward_hook(hook)
    x, cond = given(kind)
    answer = operator(x, TIME, cond)
    assert torch.equal(answer, alone(by_hand, x, cond)) and float((answer - alone(network(kind), x, cond)).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("kind", "mixing"),
    [
        *(("classes", mixing) for mixing in MIXINGS),
        *(
            (kind, mixing)
            for kind in ("three", "fourier", "skip")
            for mixing in MIXINGS
            if mixing.branch_at == "inner" and mixing.form != "fft"
        ),
    ],
)
@pytest.mark.every(3)
def test_the_last_slot_alone_is_the_last_of_all(kind: str, mixing: Mixing) -> None:
    operator, (x, cond) = stirred(TemporalUNet(network(kind), SLOTS, mixing, FEATURES)), given(kind)
    for count in (SLOTS, 2):
        whole, last = (operator(x, TIME[-count:], cond, features()[-count:], last_only) for last_only in (False, True))
        assert whole.shape == (BATCH, count, *x.shape[1:]) and last.shape == (BATCH, 1, *x.shape[1:])
        CLOSE(last, whole[:, -1:])


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
@pytest.mark.every(3)
def test_samples_do_not_meet(mixing: Mixing) -> None:
    operator, (x, cond) = stirred(TemporalUNet(network("classes"), SLOTS, mixing, FEATURES)), given("classes")
    whole = operator(x, TIME, cond, features())
    assert float((whole[0] - whole[1]).abs().max()) > 0.01
    for b in range(BATCH):
        CLOSE(operator(x[b : b + 1], TIME, cond[b : b + 1], features()), whole[b : b + 1])


@pytest.mark.parametrize("mixing", [Mixing(form, 2, places) for form in FORMS for places in ("all", "inner")], ids=repr)
@pytest.mark.every(2)
def test_a_slot_reads_none_all_or_later_ones_as_the_form_says(mixing: Mixing) -> None:
    operator, (x, _) = stirred(TemporalUNet(network(), SLOTS, mixing, FEATURES)), given()
    whole = operator(x, TIME, None, features())
    for j in range(SLOTS):
        other = features()
        other[j] += 1
        moved = (operator(x, TIME, None, other) - whole).abs().flatten(2).amax(2).amin(0) > 1e-3
        reads = {"none": [k == j for k in range(SLOTS)], "one-way": [k <= j for k in range(SLOTS)]}
        assert moved.tolist() == reads.get(mixing.form, [True] * SLOTS)


@pytest.mark.parametrize("form", ["none", "real", "one-way"])
def test_slots_that_branch_inside_are_those_that_branch_at_the_input_with_the_same_features(form: str) -> None:
    x, time, same = given()[0], torch.full((SLOTS,), 2.0), features()[:1].expand(SLOTS, -1)
    inside, ahead = (stirred(TemporalUNet(network(), SLOTS, Mixing(form, 2, "inner", fan), FEATURES)) for fan in ("inner", "input"))
    CLOSE(inside(x, time, None, same), ahead(x, time, None, same))
    assert float((inside(x, TIME, None, features()) - ahead(x, TIME, None, features())).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("way", "last_only", "rows"),
    [
        (("all", "input"), True, [8, 8, 8, 8, 8, 8, 8]),
        (("inner", "input"), False, [8, 8, 8, 8, 8, 8, 8]),
        (("inner", "input"), True, [8, 8, 8, 8, 8, 8, 2]),
        (("inner", "inner"), False, [2, 8, 8, 8, 8, 8, 8]),
        (("inner", "inner"), True, [2, 8, 8, 8, 8, 8, 2]),
    ],
)
@pytest.mark.every(5)
def test_outer_blocks_are_run_for_the_slots_that_need_them(way: tuple[str, str], last_only: bool, rows: list[int]) -> None:
    unet, (x, _), seen = network("three"), given("three"), []
    operator = TemporalUNet(unet, SLOTS, Mixing("real", 2, *way))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.resnets[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    operator(x, TIME, last_only=last_only)
    assert seen == rows


@pytest.mark.slow
def test_less_work_where_less_is_asked_for() -> None:
    x, _ = given()

    def operations(*mixing: object, last_only: bool = True, slots: int = SLOTS) -> int:
        operator = TemporalUNet(network(), SLOTS, Mixing(*mixing))
        with FlopCounterMode(display=False) as counter:
            operator(x, TIME[-slots:], last_only=last_only)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter:
        unet_call(network(), x, TIME[-1:].repeat(BATCH))
    once = counter.get_total_flops()
    for way in WAYS:
        assert operations("none", 2, *way) == once
    assert operations("none", 2, last_only=False) == SLOTS * once
    everything, inner, fan = (operations("real", 2, *way) for way in WAYS)
    assert SLOTS * once < everything < 1.5 * SLOTS * once and once < fan < inner < everything
    whole = operations("real", 2, "inner", "inner", last_only=False)
    assert fan < whole < operations("real", 2, "inner", last_only=False)
    assert once < operations("one-way") == operations("one-way", slots=1) < 1.5 * once


@pytest.mark.parametrize("mixing", [Mixing(), Mixing("one-way", 2, "inner", "inner")], ids=repr)
def test_the_network_alone_stays_as_it_was_even_after_calls_that_fail(mixing: Mixing) -> None:
    x, cond = given("classes")
    operator, time = stirred(TemporalUNet(network("classes"), SLOTS, mixing, FEATURES)), TIME[:1].repeat(BATCH)
    wanted = unet_call(network("classes"), x, time, cond)
    bad = {
        "a label that does not exist": (x, TIME, cond + 7, features()),
        "no labels": (x, TIME, None, features()),
        "channels that do not fit": (x.repeat(1, 2, 1, 1), TIME, cond, features()),
        "features too few": (x, TIME, cond, features()[:, 1:]),
        "slots without features": (x, TIME, cond, features()[1:]),
        "more slots than times": (x, TIME[1:], cond, features()),
    }
    assert torch.equal(unet_call(operator.unet, x, time, cond), wanted)
    for last_only in (False, True):
        assert float((operator(x, TIME, cond, features(), last_only)[:, -1] - wanted).abs().max()) > 0.01
        assert torch.equal(unet_call(operator.unet, x, time, cond), wanted)
    for what, arguments in bad.items():
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            operator(*arguments)
        assert torch.equal(unet_call(operator.unet, x, time, cond), wanted), what


def test_a_copy_is_an_operator_of_its_own() -> None:
    x, _ = given()
    operator = stirred(TemporalUNet(network(), SLOTS, Mixing(), FEATURES))
    before, twin = operator(x, TIME, None, features()), copy.deepcopy(operator)
    assert torch.equal(twin(x, TIME, None, features()), before)
    for part in (twin.temporal, twin.extra_embedding, twin.unet):
        for parameter in part.parameters():
            parameter.data.mul_(1.5)
        after = twin(x, TIME, None, features())
        assert float((after - before).abs().max()) > 1e-3 and torch.equal(operator(x, TIME, None, features()), before)
    for parameter in operator.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(x, TIME, None, features()), after) and not bool(operator(x, TIME, None, features()).any())


def test_weights_go_from_one_operator_to_another_and_those_of_the_network_keep_their_names() -> None:
    x, cond = given("classes")
    one = stirred(TemporalUNet(network("classes"), SLOTS, Mixing("fft", 3), FEATURES))
    torch.manual_seed(9)
    other = TemporalUNet(UNet2DModel(**{**ATTENTION_UNET, **NETWORKS["classes"]}).eval(), SLOTS, Mixing("real", 3), FEATURES)
    other.load_state_dict(one.state_dict())
    CLOSE(other(x, TIME, cond, features()), one(x, TIME, cond, features()))
    assert list(one.unet.state_dict()) == list(network("classes").state_dict())
    rest = {name.split(".")[0] for name in one.state_dict() if not name.startswith("unet.")}
    assert rest == {"temporal", "extra_embedding"} and len(set(one.parameters())) == len(one.state_dict())


@pytest.mark.parametrize("mixing", [mixing for mixing in MIXINGS if mixing.form != "fft"], ids=repr)
@pytest.mark.every(3)
def test_after_one_step_of_training_gradients_reach_all_weights(mixing: Mixing) -> None:
    operator, (x, cond) = TemporalUNet(network("classes"), SLOTS, mixing, FEATURES).requires_grad_(True), given("classes")
    optimizer, wanted = torch.optim.SGD(operator.parameters(), lr=0.1), torch.randn(BATCH, SLOTS, *x.shape[1:])
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = (operator(x, TIME, cond, features()) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    for name, parameter in operator.named_parameters():
        smallest = 0.0 if name.endswith("to_k.bias") else 1e-9  # a softmax does not feel the bias of its keys
        assert parameter.grad is not None and float(parameter.grad.abs().max()) >= smallest, name


@pytest.mark.slow
def test_one_sample_and_one_slot_are_the_same_in_all_forms() -> None:
    x, _ = given(batch=1)
    for way in WAYS:
        for last_only in (False, True):
            answers = [
                stirred(TemporalUNet(network(), 1, Mixing(form, 1, *way), FEATURES))(x, TIME[-1:], None, features(1), last_only)
                for form in ("real", "fft", "one-way")
            ]
            CLOSE(answers[1], answers[0])
            CLOSE(answers[2], answers[0])
            assert answers[0].shape == (1, 1, *x.shape[1:])
            assert float((answers[0] - alone(network(), x, None, TIME[-1:])).abs().max()) > 0.01


def test_words_networks_and_numbers_that_do_not_fit_are_refused() -> None:
    for bad in (
        {"form": "both-ways"},
        {"insert_after": "outer"},
        {"branch_at": "output"},
        {"branch_at": "inner"},
        {"form": "fft", "branch_at": "inner"},
    ):
        with pytest.raises(ModelError):
            Mixing(**bad)
    with pytest.raises(ModelError, match="between the blocks of a diffusers UNet2DModel, not of a Linear"):
        TemporalUNet(nn.Linear(2, 2), SLOTS, Mixing())
    for slots, modes in ((4, 4), (1, 2), (4, 0)):
        with pytest.raises(ModelError, match="temporal frequencies"):
            TemporalUNet(network(), slots, Mixing(modes=modes))
