"""The U-Nets against the two original architectures, written out below from their papers and names as functions of a state dict."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fewstep import ModelError
from fewstep.models.networks.unets import NETWORKS, DhariwalUNet, SongUNet, build_network

FLOAT64 = 1e-12  # the same sums in another order


class Store(dict):
    """A state dict that a forward pass fills with random weights, in the order that it asks for them."""

    def of(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            scale = 1 / math.sqrt(max(1, math.prod(shape[1:]))) if len(shape) > 1 else 0.3
            self[name] = torch.randn(shape) * scale + (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0)
        assert self[name].shape == shape
        return self[name]

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3) -> Tensor:
        weight = self.of(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return functional.conv2d(x, weight.to(x), self.of(f"{name}.bias", out).to(x), padding=kernel // 2)

    def dense(self, name: str, x: Tensor, out: int) -> Tensor:
        return functional.linear(x, self.of(f"{name}.weight", out, x.shape[1]).to(x), self.of(f"{name}.bias", out).to(x))

    def norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return functional.group_norm(x, groups, self.of(f"{name}.weight", x.shape[1]).to(x), self.of(f"{name}.bias", x.shape[1]).to(x), eps)


def fir(x: Tensor, taps: list[int], *, up: bool) -> Tensor:
    """StyleGAN2's resampling: zeros between pixels, a padded filter, every second pixel kept."""
    row = torch.tensor(taps, dtype=x.dtype)
    kernel, extra = torch.outer(row, row) / row.sum() ** 2, len(taps) - 2
    if up:
        wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        wide[..., ::2, ::2] = x
        pad = ((extra + 1) // 2 + 1, extra // 2)
    else:
        wide, pad = x, ((extra + 1) // 2, extra // 2)
    wide = functional.pad(wide, pad * 2)
    done = functional.conv2d(wide, (kernel * (4 if up else 1)).flip(0, 1).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])
    return done if up else done[..., ::2, ::2]


class NCSNpp:
    """ScoreSDE's network: numbered modules, BigGAN blocks, skips and attention scaled by sqrt(1/2)."""

    def __init__(self, **config: object) -> None:
        self.c = {"channels": 3, "nf": 8, "ch_mult": (1, 2), "n": 1, "attn": (4,), "size": 8, "taps": [1, 3, 3, 1]} | config
        self.c = {"embedding": "positional", "inputs": "none", "output": "none"} | self.c
        self.store, self.i = Store(), 0

    def next(self) -> str:
        self.i += 1
        return f"all_modules.{self.i - 1}"

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.store.norm(name, x, min(x.shape[1] // 4, 32), 1e-6)

    def block(self, x: Tensor, temb: Tensor, out: int | None = None, change: str | None = None) -> Tensor:
        name, out = self.next(), out or x.shape[1]
        h = functional.silu(self.norm(f"{name}.GroupNorm_0", x))
        if change:
            h, x = fir(h, self.c["taps"], up=change == "up"), fir(x, self.c["taps"], up=change == "up")
        h = self.store.conv(f"{name}.Conv_0", h, out)
        h = h + self.store.dense(f"{name}.Dense_0", functional.silu(temb), out)[:, :, None, None]
        h = self.store.conv(f"{name}.Conv_1", functional.silu(self.norm(f"{name}.GroupNorm_1", h)), out)
        if change or out != x.shape[1]:
            x = self.store.conv(f"{name}.Conv_2", x, out, 1)
        return (x + h) / math.sqrt(2)

    def attend(self, x: Tensor) -> Tensor:
        name, width = self.next(), x.shape[1]

        def mix(k: int, h: Tensor) -> Tensor:
            matrix, bias = self.store.of(f"{name}.NIN_{k}.W", width, width), self.store.of(f"{name}.NIN_{k}.b", width)
            return torch.einsum("bchw,cd->bdhw", h, matrix.to(h)) + bias.to(h)[:, None, None]

        h = self.norm(f"{name}.GroupNorm_0", x)
        q, k, v = (mix(j, h).flatten(2) for j in range(3))
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(width), -1)
        return (x + mix(3, torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape))) / math.sqrt(2)

    def embed(self, t: Tensor) -> Tensor:
        nf = self.c["nf"]
        if self.c["embedding"] == "fourier":
            angle = torch.log(t)[:, None] * self.store.of(f"{self.next()}.W", nf).to(t) * 2 * math.pi
        else:
            angle = t[:, None] * torch.exp(torch.arange(nf // 2).to(t) * -(math.log(10000) / (nf // 2 - 1)))
        temb = self.store.dense(self.next(), torch.cat([angle.sin(), angle.cos()], 1), 4 * nf)
        return self.store.dense(self.next(), functional.silu(temb), 4 * nf)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        c, self.i = self.c, 0
        temb, last = self.embed(t), len(c["ch_mult"]) - 1
        hs, side = [self.store.conv(self.next(), x, c["nf"])], x
        for level, mult in enumerate(c["ch_mult"]):
            for _ in range(c["n"]):
                h = self.block(hs[-1], temb, c["nf"] * mult)
                hs.append(self.attend(h) if h.shape[-1] in c["attn"] else h)
            if level < last:
                h = self.block(hs[-1], temb, change="down")
                if c["inputs"] == "input_skip":
                    side, _ = fir(side, c["taps"], up=False), self.next()
                    h = h + self.store.conv(f"{self.next()}.Conv", side, h.shape[1], 1)
                elif c["inputs"] == "residual":
                    side = h = (self.halved(f"{self.next()}.Conv2d_0", side, h.shape[1]) + h) / math.sqrt(2)
                hs.append(h)
        h = self.block(self.attend(self.block(hs[-1], temb)), temb)
        picture = None
        for level, mult in reversed(list(enumerate(c["ch_mult"]))):
            for _ in range(c["n"] + 1):
                h = self.block(torch.cat([h, hs.pop()], 1), temb, c["nf"] * mult)
            h = self.attend(h) if h.shape[-1] in c["attn"] else h
            if c["output"] == "output_skip":
                if picture is not None:
                    picture, _ = fir(picture, c["taps"], up=True), self.next()
                more = self.final(h)
                picture = more if picture is None else picture + more
            h = self.block(h, temb, change="up") if level else h
        return self.final(h) if picture is None else picture

    def final(self, h: Tensor) -> Tensor:
        name = self.next()
        h = functional.silu(self.norm(name, h))
        return self.store.conv(self.next(), h, self.c["channels"])

    def halved(self, name: str, x: Tensor, out: int) -> Tensor:
        """A convolution that halves the resolution: filter and convolve an image padded once."""
        weight, bias = self.store.of(f"{name}.weight", out, x.shape[1], 3, 3), self.store.of(f"{name}.bias", out)
        row = torch.tensor(self.c["taps"], dtype=x.dtype)
        kernel = (torch.outer(row, row) / row.sum() ** 2).expand(x.shape[1], 1, -1, -1)
        filtered = functional.conv2d(functional.pad(x, (2, 2, 2, 2)), kernel, groups=x.shape[1])
        return functional.conv2d(filtered, weight.to(x), bias.to(x), stride=2)


class ADM:
    """guided-diffusion's network with residual blocks that change the resolution and scale-shift norms."""

    def __init__(self, **config: object) -> None:
        self.c = {"channels": 3, "out": 6, "nf": 32, "ch_mult": (1, 2), "n": 1, "attn": (4,), "size": 8, "heads": 2} | config
        self.c = {"new_order": False, "classes": 5} | self.c
        self.store = Store()

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.store.norm(name, x, 32, 1e-5)

    def block(self, name: str, x: Tensor, emb: Tensor, out: int | None = None, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        out = out or x.shape[1]
        h = functional.silu(self.store.norm(f"{name}.in_layers.0", x, 32, 1e-5))
        if change:
            h, x = change(h), change(x)
        h = self.store.conv(f"{name}.in_layers.2", h, out)
        scale, shift = self.store.dense(f"{name}.emb_layers.1", functional.silu(emb), 2 * out)[:, :, None, None].chunk(2, 1)
        h = functional.silu(self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift)
        h = self.store.conv(f"{name}.out_layers.3", h, out)
        return h + (x if out == x.shape[1] else self.store.conv(f"{name}.skip_connection", x, out, 1))

    def attend(self, name: str, x: Tensor) -> Tensor:
        width, heads = x.shape[1], self.c["heads"]

        def row(part: str, h: Tensor, out: int) -> Tensor:
            weight, bias = self.store.of(f"{name}.{part}.weight", out, width, 1), self.store.of(f"{name}.{part}.bias", out)
            return functional.conv1d(h, weight.to(h), bias.to(h))

        qkv = row("qkv", self.norm(f"{name}.norm", x).flatten(2), 3 * width)
        done = []
        for head in range(heads):  # one head at a time, by the order of the channels
            each = width // heads
            if self.c["new_order"]:
                q, k, v = (qkv[:, j * width + head * each : j * width + (head + 1) * each] for j in range(3))
            else:
                q, k, v = (qkv[:, (3 * head + j) * each : (3 * head + j + 1) * each] for j in range(3))
            done.append(v @ torch.softmax(q.mT @ k / math.sqrt(each), -1).mT)
        return x + row("proj_out", torch.cat(done, 1), width).reshape(x.shape)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c, nf = self.c, self.c["nf"]
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(nf // 2).to(t) / (nf // 2))
        emb = self.store.dense("time_embed.0", torch.cat([angle.cos(), angle.sin()], 1), 4 * nf)
        emb = self.store.dense("time_embed.2", functional.silu(emb), 4 * nf)
        if y is not None:
            emb = emb + self.store.of("label_emb.weight", c["classes"], 4 * nf).to(emb)[y]
        hs, i = [self.store.conv("input_blocks.0.0", x, int(nf * c["ch_mult"][0]))], 1
        for level, mult in enumerate(c["ch_mult"]):
            for _ in range(c["n"]):
                h = self.block(f"input_blocks.{i}.0", hs[-1], emb, int(nf * mult))
                hs.append(self.attend(f"input_blocks.{i}.1", h) if h.shape[-1] in c["attn"] else h)
                i += 1
            if level < len(c["ch_mult"]) - 1:
                hs.append(self.block(f"input_blocks.{i}.0", hs[-1], emb, change=lambda z: functional.avg_pool2d(z, 2)))
                i += 1
        h = self.block("middle_block.2", self.attend("middle_block.1", self.block("middle_block.0", hs[-1], emb)), emb)
        i = 0
        for level, mult in reversed(list(enumerate(c["ch_mult"]))):
            for k in range(c["n"] + 1):
                h, j = self.block(f"output_blocks.{i}.0", torch.cat([h, hs.pop()], 1), emb, int(nf * mult)), 1
                if h.shape[-1] in c["attn"]:
                    h, j = self.attend(f"output_blocks.{i}.1", h), 2
                if level and k == c["n"]:
                    h = self.block(f"output_blocks.{i}.{j}", h, emb, change=lambda z: functional.interpolate(z, scale_factor=2.0))
                i += 1
        return self.store.conv("out.2", functional.silu(self.norm("out.0", h)), c["out"])


def state_of(network: NCSNpp | ADM, *cond: Tensor) -> dict[str, Tensor]:
    """A small random state dict in the names of the original."""
    c = network.c
    network(torch.randn(1, c["channels"], c["size"], c["size"]), torch.rand(1), *cond)
    return dict(network.store)


@pytest.mark.parametrize(
    ("kind", "options", "parameters", "numbers"),
    [
        (SongUNet, {"img_resolution": 32, "channel_mult": [2, 2, 2], "augment_dim": 9}, 55733891, 32),
        (DhariwalUNet, {"img_resolution": 64, "label_dim": 1000}, 295899267, 48),
    ],
)
def test_the_published_sizes(kind: type, options: dict, parameters: int, numbers: int) -> None:
    """DDPM++ for CIFAR-10 and ADM for ImageNet 64, of 56 and 296 million parameters (arXiv 2206.00364, table 7; 2105.05233, table 3)."""
    with torch.device("meta"):
        network = kind(in_channels=3, out_channels=3, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(b.numel() for b in network.buffers()) == numbers


EDM_NAMES = """enc.8x8_conv.weight enc.8x8_conv.bias enc.8x8_block0.norm0.weight enc.8x8_block0.conv0.weight enc.8x8_block0.affine.bias
enc.4x4_down.conv0.resample_filter enc.4x4_down.skip.weight enc.4x4_down.skip.resample_filter enc.4x4_aux_residual.weight
enc.4x4_aux_residual.resample_filter enc.4x4_block0.skip.weight enc.4x4_block0.norm2.weight enc.4x4_block0.qkv.weight
enc.4x4_block0.proj.bias dec.4x4_in0.qkv.weight dec.4x4_in1.conv1.weight dec.4x4_block1.qkv.bias dec.8x8_up.conv0.resample_filter
dec.8x8_block1.skip.bias dec.8x8_aux_norm.weight dec.8x8_aux_conv.weight map_noise.freqs map_label.weight map_augment.weight
map_layer0.weight map_layer1.bias"""


def test_the_names_are_those_of_edm() -> None:
    options = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9, "label_dim": 3}
    song = SongUNet(8, 3, 3, **options, embedding_type="fourier", channel_mult_noise=2, encoder_type="residual")
    names = set(song.state_dict())
    assert set(EDM_NAMES.split()) <= names and not {"dec.4x4_block0.qkv.weight", "map_augment.bias", "dec.4x4_aux_norm.weight"} & names
    adm = set(DhariwalUNet(8, 3, 3, **{**options, "model_channels": 64}).state_dict())
    assert {"out_norm.weight", "out_conv.bias", "enc.4x4_down.skip.resample_filter", "dec.4x4_block0.qkv.weight"} <= adm
    assert not {"map_label.bias", "enc.4x4_down.skip.weight"} & adm  # its skips change the resolution alone
    assert "enc.4x4_block0.qkv.weight" not in set(DhariwalUNet(8, 3, 3, **{**options, "model_channels": 16}).state_dict())  # no whole head


def test_labels_become_rows_and_none_is_a_label_too() -> None:
    torch.manual_seed(0)
    x, time, labels = torch.randn(3, 1, 4, 4), torch.rand(3), torch.tensor([0, 2, 1])
    small = {"label_dim": 3, "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    for kind, gain in ((SongUNet, math.sqrt(3)), (DhariwalUNet, 1.0)):
        network = kind(4, 1, 1, **small).eval()
        label, seen = network.map_label, []
        label.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(inputs[0]))
        network(x, time, labels)
        torch.testing.assert_close(seen[-1], torch.eye(3)[labels] * gain)
        assert torch.equal(network(x, time), network(x, time, torch.full((3,), 3))) and not bool(seen[-1].any())
    strict = DhariwalUNet(4, 1, 1, **small, null_label=False)
    with pytest.raises(ValueError, match="a class for every image"):
        strict(x, time)
    with pytest.raises(ValueError, match="takes no class labels"):
        SongUNet(4, 1, 1, **{**small, "label_dim": 0})(x, time, labels)


def test_attention_is_by_head_channel_and_part() -> None:
    """One head of one network against an explicit sum over positions."""
    torch.manual_seed(0)
    network = DhariwalUNet(4, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[4], num_heads=2).double()
    block, x = network.enc["4x4_block0"], torch.randn(1, 8, 4, 4, dtype=torch.float64)
    qkv = block.qkv(block.norm2(x)).flatten(2)[0]
    for head in range(2):
        q, k, v = (torch.stack([qkv[head * 12 + 3 * c + part] for c in range(4)]) for part in range(3))
        expected = torch.stack([sum(w * v[:, j] for j, w in enumerate(torch.softmax(q[:, i] @ k / 2, 0))) for i in range(16)], 1)
        torch.testing.assert_close(block._attention(x)[0, 4 * head : 4 * head + 4].flatten(1), expected, rtol=FLOAT64, atol=FLOAT64)


def test_what_cannot_be_built_says_why() -> None:
    small = {"img_resolution": 4, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    weights = SongUNet(**small).state_dict()
    with torch.no_grad():
        assert set(NETWORKS) == {"SongUNet", "DhariwalUNet"} and build_network("SongUNet", small, weights).options == small
    for name, options, change, says in [
        ("SongUnet", {}, {}, "did you mean SongUNet"),
        ("SongUNet", {"model_chanels": 8}, {}, "no option model_chanels; it has: img_resolution"),
        ("SongUNet", {"encoder_type": "skp"}, {}, "unknown encoder_type 'skp': did you mean skip"),
        ("SongUNet", {"channel_mult": [1] * 4}, {}, "images of 4x4 cannot be halved 3 times"),
        ("SongUNet", {"channel_mult": "wide"}, {}, "no SongUNet has the options"),
        ("SongUNet", {"model_channels": -8}, {}, "no SongUNet has the options"),
        ("SongUNet", {"num_blocks": 2}, {}, "it lacks enc.4x4_block1.norm0.bias; it lacks enc.4x4_block1.conv0.weight, and"),
        ("SongUNet", {}, {"more": torch.ones(1)}, "the file has more, which is not known"),
        ("SongUNet", {}, {"map_layer1.bias": torch.ones(3)}, r"map_layer1.bias of shape \[3\], not \[32\]"),
    ]:
        with pytest.raises(ModelError, match=says):
            build_network(name, {**small, **options}, {**weights, **change})


def test_a_network_keeps_the_dtype_of_its_weights_and_leaves_chance_alone() -> None:
    small = {"img_resolution": 4, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    weights = {key: value.bfloat16() for key, value in SongUNet(**small).state_dict().items()}
    before = torch.random.get_rng_state()
    network = build_network("SongUNet", small, weights)
    assert torch.equal(before, torch.random.get_rng_state()) and not network.training
    assert network(torch.randn(2, 1, 4, 4).bfloat16(), torch.rand(2)).dtype == torch.bfloat16
