"""The Inception network against its layers written down here by name, and what its weights files may be."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, batch_norm, conv2d, interpolate, max_pool2d

from fewstep import FewstepError
from fewstep.evaluate.metrics.features import load_features
from fewstep.evaluate.metrics.inception import InceptionV3, load_inception

FLOAT32 = 1e-4  # of the largest feature, through some 20 layers


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random ones that keep the scale of the signal, in the format of the published file: no counts of batches."""
    generator, made = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        wanted = InceptionV3().state_dict()
    for name, value in wanted.items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith(("conv.weight", "fc.weight")):
            made[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            made[name] = 1 + 0.1 * noise.abs()
        elif not name.endswith("num_batches_tracked"):
            made[name] = 0.1 * noise
    return made


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(weights, path)
    return path


class Written:
    """The network by its published table: name of a unit, stride, padding; everything else is in the weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = weights

    def unit(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        w = {key.removeprefix(f"{name}."): value for key, value in self.w.items() if key.startswith(f"{name}.")}
        kernel = w["conv.weight"].shape[2:]
        valid = stride == 2 or name in ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
        x = conv2d(x, w["conv.weight"], stride=stride, padding=0 if valid else (kernel[0] // 2, kernel[1] // 2))
        return batch_norm(x, w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], eps=1e-3).clamp(min=0)

    def chain(self, block: str, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.unit(f"{block}.{name.removesuffix('/2')}", x, 2 if name.endswith("/2") else 1)
        return x

    def mean(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, 3, 1, 1) * 9 / avg_pool2d(torch.ones_like(x), 3, 1, 1, divisor_override=1)

    def block(self, name: str, x: Tensor) -> Tensor:
        kind = {"5": "A", "6a": "B", "6": "C", "7a": "D", "7": "E"}
        kind = kind.get(name[-2:]) or kind[name[-2]]
        pooled = self.chain(name, max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else self.mean(x), "branch_pool") if kind in "ACE" else None
        if kind == "B":
            branches = [("branch3x3/2",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/2")]
        elif kind == "D":
            branches = [("branch3x3_1", "branch3x3_2/2"), (*(f"branch7x7x3_{k}" for k in (1, 2, 3)), "branch7x7x3_4/2")]
        elif kind == "A":
            branches = [("branch1x1",), ("branch5x5_1", "branch5x5_2"), tuple(f"branch3x3dbl_{k}" for k in (1, 2, 3))]
        elif kind == "C":
            branches = [("branch1x1",), tuple(f"branch7x7_{k}" for k in (1, 2, 3)), tuple(f"branch7x7dbl_{k}" for k in (1, 2, 3, 4, 5))]
        else:
            branches = [("branch1x1",), *(("branch3x3_1", f"branch3x3_2{k}") for k in "ab")]
            branches += [("branch3x3dbl_1", "branch3x3dbl_2", f"branch3x3dbl_3{k}") for k in "ab"]
        made = [self.chain(name, x, *one) for one in branches]
        return torch.cat([*made, max_pool2d(x, 3, 2) if pooled is None else pooled], 1)

    def __call__(self, images: Tensor) -> Tensor:
        x = interpolate(images.repeat(1, 3 // images.shape[1], 1, 1), size=(299, 299), mode="bilinear", align_corners=False)
        x = self.unit("Conv2d_2b_3x3", self.unit("Conv2d_2a_3x3", self.unit("Conv2d_1a_3x3", x, 2)))
        x = max_pool2d(self.unit("Conv2d_4a_3x3", self.unit("Conv2d_3b_1x1", max_pool2d(x, 3, 2))), 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.block(f"Mixed_{name}", x)
        return adaptive_avg_pool2d(x, 1).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.slow
def test_features_are_those_of_the_layers_by_name(weights: dict[str, Tensor], file: Path, channels: int) -> None:
    grey = torch.randint(256, (1, channels, 32, 32), generator=torch.Generator().manual_seed(1))
    images = grey / 127.5 - 1
    network = load_features(f"inception:{file}", (channels, 32, 32))
    found, expected = network(images), Written(weights)(images)
    assert found.shape == (1, 2048)
    assert float((found - expected).abs().max() / expected.abs().max()) < FLOAT32
    assert float(found.std()) > 0.01  # it is not all rectified away
    slightly = images + 0.4 / 127.5  # rounded to the same 8 bits
    torch.testing.assert_close(network(slightly), found, rtol=0, atol=0)


def test_the_names_and_sizes_are_those_of_the_file(weights: dict[str, Tensor]) -> None:
    published = 27_161_264 - 3_326_696 + 8 * 2049  # of the network with 1000 classes, less its auxiliary classifier, and 8 more classes
    assert len(weights) == 94 * 5 + 2
    assert sum(value.numel() for key, value in weights.items() if "running" not in key) == published
    assert weights["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1) and weights["fc.weight"].shape == (1008, 2048)


@pytest.mark.slow
def test_other_files_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FewstepError, match="no Inception weights"):
        load_inception(path)
    torch.save({key: value for key, value in weights.items() if "Mixed_7c.branch1x1" not in key}, path)
    with pytest.raises(FewstepError, match=r"Mixed_7c.branch1x1.conv.weight, Mixed_7c.branch1x1.bn.weight, .* and 2 more missing"):
        load_inception(path)
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(FewstepError, match="fc.weight missing or of another shape"):
        load_inception(path)
    torch.save([1, 2], path)
    with pytest.raises(FewstepError, match="holds a list"):
        load_inception(path)
    torch.save({"network": InceptionV3}, path)  # a class: code
    with pytest.raises(FewstepError, match="not a file of weights alone"):
        load_inception(path)
    path.write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(FewstepError, match="not a file of weights alone"):
        load_inception(path)
