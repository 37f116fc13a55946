"""Train the CIFAR-10 feature network: a classifier whose last hidden numbers serve as features for Frechet distances.

    python -m benchmarks.cifar10.features --preset cpu --data runs/cifar10 --out runs/cifar10/features-16

``cpu`` is for 16x16 pictures and takes minutes on one core; ``gpu`` is for 32x32. The data are the files of
``python -m benchmarks.cifar10.data``. The 50,000 training pictures train it, mirrored and shifted at random; the 10,000 test pictures
measure it, once, at the end. Writes ``features.safetensors`` and ``features.json`` (accuracy, command). A killed run continues
where it was and ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from fewstep.data.images import Images, load_images
from fewstep.runtime.artifact import check_writable, read_json, write_whole
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import default_device

ROOT = Path(__file__).parents[2]
LEVELS = 256  # of a channel of a pixel


@dataclass(frozen=True)
class FeaturesConfig:
    """A classifier and its training. ``shift`` is the largest move of a picture, in pixels; ``widths`` are the channels of each stage."""

    size: int
    widths: tuple[int, ...]
    blocks: int
    epochs: int
    features: int = 64
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    shift: int = 2
    smoothing: float = 0.1
    classes: int = 10
    bf16: bool = False
    seed: int = 0


PRESETS = {
    "smoke": FeaturesConfig(16, (16,), 1, epochs=1, features=8, batch=1000),
    "cpu": FeaturesConfig(16, (32, 64, 128), 1, epochs=12, bf16=True),
    "gpu": FeaturesConfig(32, (64, 128, 256), 2, epochs=60, features=128, batch=512, lr=0.4, shift=4, bf16=True),
}


class Block(nn.Module):
    """Two convolutions and what they are added to; the first may halve the picture."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(given, made, 3, stride, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()),
            *(nn.Conv2d(made, made, 3, padding=1, bias=False), nn.BatchNorm2d(made)),
        )
        same = given == made and stride == 1
        self.past = nn.Identity() if same else nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.past(x))


class CifarFeatures(nn.Module):
    """A residual classifier of colour pictures; called, it gives the numbers before its last layer.

    Images are first rounded to 8 bits, as Frechet distances of photographs are taken, so it does not see noise below half a level.
    """

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__()
        self.size, self.num_features = config.size, config.features
        stages, given = [], config.widths[0]
        for level, made in enumerate(config.widths):
            for k in range(config.blocks):
                stages.append(Block(given, made, 2 if level and not k else 1))
                given = made
        self.body = nn.Sequential(
            *(nn.Conv2d(3, config.widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(config.widths[0]), nn.ReLU(), *stages),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, config.features), nn.GELU()),
        )
        self.head = nn.Linear(config.features, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, F]`` of images ``[B, 3, H, W]`` in [-1, 1]."""
        if images.shape[1:] != (3, self.size, self.size):
            raise FewstepError(f"these features are for shape {(3, self.size, self.size)}, the samples have {tuple(images.shape[1:])}")
        eight_bits = ((images + 1) * (LEVELS / 2) - 0.5).round().clamp(0, LEVELS - 1)
        return self.body(eight_bits * (4 / (LEVELS - 1)) - 2)

    def labels(self, images: Tensor) -> Tensor:
        """The class it sees in each image, ``[B]``."""
        return self.head(self(images)).argmax(1)


def load_cifar_features(folder: Path) -> CifarFeatures:
    """The trained network, ready for inference.

    Raises:
        FewstepError: the folder holds none (and how to make it).
    """
    if not (folder / "features.json").is_file():
        raise FewstepError(f"no feature network in {folder}: train it with 'python -m benchmarks.cifar10.features --out {folder}'")
    options: dict[str, Any] = read_json(folder / "features.json")["config"]
    network = CifarFeatures(FeaturesConfig(**{**options, "widths": tuple(options["widths"])}))
    network.load_state_dict(load_file(folder / "features.safetensors"))
    return network.eval().requires_grad_(False)


def network(shape: tuple[int, ...]) -> CifarFeatures:
    """That of the study, for ``fewstep bench --features benchmarks.cifar10.features:network``.

    Raises:
        FewstepError: it was not trained yet.
    """
    return load_cifar_features(ROOT / "assets" / f"cifar10-{shape[-1]}" / "features")


def smoke(shape: tuple[int, ...]) -> CifarFeatures:
    """That of a study that is not kept."""
    return load_cifar_features(ROOT / "assets" / f"cifar10-{shape[-1]}-smoke" / "features")


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Images ``[B, C, H, W]``, half of them mirrored, each moved by up to ``shift`` pixels; what comes in is what was at the edge."""
    n, _, height, width = images.shape
    images = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    wide = pad(images, (shift,) * 4, mode="reflect")
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = (dy + torch.arange(height))[:, None, :, None], (dx + torch.arange(width))[:, None, None, :]
    return wide[torch.arange(n)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns]


def train(images: Images, config: FeaturesConfig, folder: Path, identity: str = "") -> CifarFeatures:
    """The trained classifier. Every epoch draws from its own seed; after each there is a checkpoint, of which a killed run goes on."""
    assert images.labels is not None
    torch.manual_seed(config.seed)
    device = default_device()
    network = CifarFeatures(config).to(device)
    decays = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    per_epoch = len(images.x) // config.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.epochs * per_epoch, pct_start=0.25)
    first = resume(network, optimizer, schedule, folder, identity)
    for epoch in range(first, config.epochs):
        began, total = time.monotonic(), torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(config.seed * 1009 + epoch)
        network.train()
        for index in torch.randperm(len(images.x), generator=generator)[: per_epoch * config.batch].split(config.batch):
            x, y = augmented(images.x[index], config.shift, generator).to(device), images.labels[index].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                loss = cross_entropy(network.head(network(x)), y, label_smoothing=config.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        rate = per_epoch * config.batch / (time.monotonic() - began)
        print(f"epoch {epoch + 1}/{config.epochs}: loss {float(total) / per_epoch:.4f}, {rate:.0f} images/s", flush=True)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state |= {"epoch": epoch + 1, "identity": identity}
        write_whole(folder / "checkpoint.pt", lambda path, state=state: torch.save(state, path))
    return network.eval().requires_grad_(False).cpu()


def resume(network: nn.Module, optimizer: Any, schedule: Any, folder: Path, identity: str) -> int:
    """The epoch to go on with, after what the checkpoint holds was put back.

    Raises:
        FewstepError: it is of another run.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["identity"] != identity:
        raise FewstepError(f"{path} belongs to another run ({state['identity']}): remove it, or train with those options")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["epoch"])


@torch.no_grad()
def accuracy(network: CifarFeatures, images: Images) -> float:
    """Share of images whose label it sees."""
    assert images.labels is not None
    device = next(network.parameters()).device
    seen = torch.cat([network.labels(part.to(device)).cpu() for part in images.x.split(1000)])
    return float((seen == images.labels).double().mean())


def make(data: Path, config: FeaturesConfig, out: Path, command: str) -> dict[str, Any]:
    """Train, measure and save; what ``features.json`` says. What is there already is not made again.

    Raises:
        FewstepError: no data (and how to make it), or the folder holds a network of other options.
    """
    names = {split: data / f"cifar10-{config.size}-{split}.npz" for split in ("train", "test")}
    if not all(path.is_file() for path in names.values()):
        raise FewstepError(f"no pictures in {data}: make them with 'python -m benchmarks.cifar10.data --size {config.size} --out {data}'")
    identity = json.loads(json.dumps(asdict(config)))
    if (out / "features.json").is_file():
        made = read_json(out / "features.json")
        if made["config"] != identity:
            raise FewstepError(f"{out} holds a network of other options: choose another folder, or remove it")
        return made
    check_writable(out)
    began = time.monotonic()
    network = train(load_images(names["train"]), config, out, json.dumps(identity))
    test = load_images(names["test"])
    size = sum(p.numel() for p in network.parameters())
    done = {"accuracy": accuracy(network, test), "test_images": len(test.x), "parameters": size, "features": config.features}
    done |= {"seconds": round(time.monotonic() - began), "command": command, "config": identity}
    write_whole(out / "features.safetensors", lambda path: save_file(network.state_dict(), path))
    write_whole(out / "features.json", (json.dumps(done, indent=1) + "\n").encode())
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--epochs", type=int, help="another number than the preset's")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "cifar10", help="the folder with the pictures")
    parser.add_argument("--out", type=Path, help="by default features-SIZE beside the pictures")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    config = config if args.epochs is None else replace(config, epochs=args.epochs)
    out = args.data / f"features-{config.size}" if args.out is None else args.out
    try:
        done = make(args.data, config, out, shlex.join(["python", "-m", "benchmarks.cifar10.features", *sys.argv[1:]]))
    except FewstepError as error:
        sys.exit(f"error: {error}")
    print(f"features: {out}, test accuracy {done['accuracy']:.2%}")


if __name__ == "__main__":
    main()
