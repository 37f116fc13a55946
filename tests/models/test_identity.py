"""The fingerprint tells models apart that answer differently, and finds the same model again whatever it is wrapped or laid out in."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fewstep import DiscreteVP, Model, ModelError, classifier_free, dynamic_threshold, load_model
from fewstep.core.prediction import Prediction
from fewstep.models.identity import parts

LAW = DiscreteVP.linear()
LEVEL = 2.0


def fingerprint(network: object, **options: object) -> str:
    return Model(network, LAW, "epsilon", shape=(3, 4, 4), **options).fingerprint


class Net(nn.Module):
    """A convolution with a plain setting, a buffer that is not saved and an activation without weights."""

    def __init__(self, gain: float = 1.0, act: type[nn.Module] = nn.SiLU, table: float = 1.0, **more: object) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1, **more)
        self.act, self.gain = act(), gain
        self.register_buffer("table", torch.full((2,), table), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * self.act(self.conv(x))


class Scaled(nn.Module):
    """A low-rank update of a network, at a scale that is kept as a library of adapters keeps it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.base, self.scaling = Net(), {"default": scale}


class Extra(Net):
    def get_extra_state(self) -> object:
        return {"version": 3}

    def set_extra_state(self, state: object) -> None: ...


@dataclass
class Call:
    gain: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * x


def times(gain: float) -> Callable[..., Tensor]:
    return lambda x, t: gain * x


def by_global(x: Tensor, t: Tensor) -> Tensor:
    return LEVEL * x


def changed(network: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(network)
    return network


def zero_weight(network: nn.Module) -> None:
    with torch.no_grad():
        network.conv.weight[0, 0, 0, 0] = 0


SAME_LINE = (lambda x, t: 0 * x, lambda x, t: 1 * x, lambda x, t: 1 * t)
DIFFERENT = {
    "lambdas on one line": SAME_LINE,
    "closures": (times(1.0), times(2.0)),
    "closures of tensors": (times(torch.zeros(3)), times(torch.ones(3))),
    "closures of modules": (times(Net()), times(changed(Net(), zero_weight))),
    "defaults": (lambda x, t, k=1: k * x, lambda x, t, k=2: k * x),
    "partials": (functools.partial(torch.add, 1), functools.partial(torch.add, 2)),
    "objects": (Call(1.0), Call(2.0)),
    "methods": (Call(1.0).__call__, Call(2.0).__call__),
    "weights": (Net(), changed(Net(), zero_weight)),
    "a plain attribute": (Net(), Net(gain=2.0), changed(Net(), lambda net: setattr(net, "late", 3.0))),
    "a whole number": (Net(gain=1), Net(gain=2)),
    "a setting in a dict": tuple(changed(Net(), lambda net, k=k: setattr(net, "options", {"k": (k, "a")})) for k in (0.0, 1.0)),
    "a function as attribute": tuple(changed(Net(), lambda net, f=f: setattr(net, "norm", f)) for f in (torch.relu, times(1.0))),
    "lists in an object": (Call([1.0]), Call([2.0])),
    "an activation": (Net(), Net(act=nn.ReLU)),
    "an activation's slope": (Net(act=nn.LeakyReLU), Net(act=functools.partial(nn.LeakyReLU, 0.3))),
    "padding": (Net(), Net(padding_mode="circular")),
    "the scale of an adapter": (Scaled(1.0), Scaled(0.5)),
    "a forward of its own": tuple(changed(nn.Module(), lambda net, f=f: setattr(net, "forward", f)) for f in SAME_LINE),
    "names of classes": (nn.Sequential(nn.Flatten()), nn.Sequential(nn.Identity())),
    "dtype": (Net(), Net().double()),
    "guidance": tuple(classifier_free(load_model("digits-edm"), scale, torch.tensor(10)) for scale in (2.0, 3.0)),
    "thresholds": tuple(dynamic_threshold(load_model("digits-edm"), q) for q in (0.9, 0.99)),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_models_that_answer_differently_have_other_fingerprints(case):
    networks = DIFFERENT[case]
    assert len({fingerprint(network) for network in networks}) == len(networks)


@pytest.mark.parametrize("identity", ["", "weights v1"])
def test_a_model_that_computes_in_another_dtype_has_another_fingerprint(identity):
    one = Model(Net(), DiscreteVP.linear(), "v", identity=identity)
    others = [replace(one, dtype=torch.bfloat16), replace(one, dtype=torch.float16), replace(one, time_dtype=torch.float16)]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert replace(one, dtype=torch.float32).fingerprint == one.fingerprint


def in_channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def offloaded(network: nn.Module) -> nn.Module:
    """Put the weights where accelerate keeps them of a module that it runs on another device."""
    kept = dict(network.conv.named_parameters())
    for name in kept:
        setattr(network.conv, name, nn.Parameter(torch.empty_like(kept[name], device="meta")))
    network.conv._hf_hook = SimpleNamespace(weights_map=kept, execution_device="cpu")
    network.conv._old_forward, network.conv.forward = network.conv.forward, lambda x: x
    return network


def sparse(network: nn.Module, dense: Tensor) -> nn.Module:
    network.register_buffer("mask", dense.to_sparse())
    return network


class Shell(nn.Module):
    """What ``torch.compile`` returns, to who looks for the network inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._orig_mod = network


THE_SAME = {
    "compiled": lambda: Shell(Net()),
    "compiled twice": lambda: Shell(Shell(Net())),
    "in parallel": lambda: nn.DataParallel(Net()),
    "compiled and in parallel": lambda: nn.DataParallel(Shell(Net())),
    "channels last": lambda: in_channels_last(Net()),
    "copied": lambda: copy.deepcopy(Net()),
    "in training": lambda: Net().train(),
    "without gradients": lambda: Net().requires_grad_(False),
    "hooked": lambda: changed(Net(), lambda net: net.register_forward_hook(lambda *_: None)),
    "offloaded": lambda: offloaded(Net()),
    "with other tables, which it computes": lambda: Net(table=2.0),
    "after it has kept what it computed": lambda: changed(
        Net(), lambda net: (setattr(net, "cache", torch.zeros(3)), setattr(net, "log", [0.5]))
    ),
    "on a device that it names": lambda: changed(Net(), lambda net: setattr(net, "device", torch.device("cpu"))),
}


@pytest.mark.parametrize("case", THE_SAME)
def test_the_same_model_has_the_same_fingerprint(case):
    assert fingerprint(THE_SAME[case]()) == fingerprint(Net())


def test_a_compiled_network_inside_another_is_the_same():
    def outer(inner: nn.Module) -> nn.Module:
        return nn.Sequential(inner, nn.ReLU())

    assert fingerprint(outer(Shell(Net()))) == fingerprint(outer(nn.DataParallel(Net()))) == fingerprint(outer(Net()))


@pytest.mark.slow  # for what is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_pytorch_compiles_is_the_same():
    assert fingerprint(torch.compile(Net())) == fingerprint(torch.compile(torch.compile(Net()))) == fingerprint(Net())


def test_what_is_kept_strangely_has_a_fingerprint():
    mask = torch.eye(3)
    assert fingerprint(sparse(Net(), mask)) == fingerprint(sparse(Net(), mask)) != fingerprint(sparse(Net(), 2 * mask))
    assert fingerprint(Extra()) == fingerprint(Extra())
    values = [torch.zeros(()), torch.zeros(0), torch.tensor([True]), torch.ones(2, dtype=torch.cfloat).conj(), torch.ones(2).bfloat16()]
    assert len({fingerprint(times(value)) for value in values}) == len(values)


def test_a_global_that_a_function_reads_is_a_part_of_it(monkeypatch):
    before = fingerprint(by_global)
    monkeypatch.setattr(sys.modules[__name__], "LEVEL", 3.0)
    assert fingerprint(by_global) != before


def test_a_change_of_the_weights_is_seen_and_a_count_of_calls_is_not():
    network = Net()
    network.calls = 0
    model = Model(network, LAW, "epsilon", shape=(3, 4, 4))
    before = model.fingerprint
    network.calls, network.seen, network.cache = 1, [0.5], torch.zeros(2)
    assert model.fingerprint == before
    network.gain = 2.0
    second = model.fingerprint
    zero_weight(network)
    assert len({before, second, model.fingerprint}) == 3
    network.conv.weight = nn.Parameter(torch.zeros_like(network.conv.weight))
    assert model.fingerprint not in (before, second)


def test_call_time_and_prediction_are_parts_of_the_model():
    def own(gain: float) -> Prediction:
        return Prediction("own", lambda alpha, sigma: (gain * alpha, sigma))

    assert fingerprint(Net(), call=lambda net, x, t, cond: net(x, t)) != fingerprint(Net(), call=lambda net, x, t, cond: net(x, 2 * t))
    assert fingerprint(Net(), time=lambda t: 2 * t) != fingerprint(Net())
    assert Model(Net(), LAW, own(1.0)).fingerprint != Model(Net(), LAW, own(2.0)).fingerprint


@pytest.mark.parametrize("path", ["freq_shift", "act_fn"])
def test_the_configuration_of_a_diffusers_network_is_a_part_of_it(path):
    model = load_model("digits-edm")
    other = copy.deepcopy(model.network)
    other.register_to_config(**{path: {"freq_shift": 1, "act_fn": "gelu"}[path]})
    assert replace(model, network=other).fingerprint != model.fingerprint


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_another_process(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch, fewstep\nclass Net(torch.nn.Module):\n    gain = 2\n    def forward(self, x, t): return x\n"
        "def call(net, x, t, cond): return {1, 2, 3} and net(x, t)\n"
        "made = Net(); made.some = {'b': 1.5, 'a': {'x', 'y', 'z'}}\n"
        "print(fewstep.Model(made, fewstep.DiscreteVP.linear(), 'v', call=call).fingerprint)\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "own.py"], cwd=tmp_path, env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop().strip()) == 16


def test_what_cannot_be_told_apart_is_refused_unless_it_is_named():
    lock = (x for x in "")  # an object that says nothing of itself

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x if lock else t

    with pytest.raises(ModelError, match=r"cannot be told from others: network.lock is a generator, .* make the Model with identity="):
        _ = fingerprint(network)
    assert fingerprint(network, identity="first") == fingerprint(network, identity="first") != fingerprint(network, identity="second")
    nowhere = Net().to("meta")
    with pytest.raises(ModelError, match="the weight network.conv.bias is on the meta device, without values: load it, or .* identity="):
        _ = fingerprint(nowhere)
    assert len(fingerprint(nowhere, identity="offloaded v1")) == 16


def test_what_holds_itself_ends():
    network = Net()
    network.itself = [network]
    assert len(list(parts(network))) < 30 and len(fingerprint(network)) == 16
