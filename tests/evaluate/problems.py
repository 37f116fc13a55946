"""Models of the tests of evaluation: an analytic one, and small networks in folders."""

import copy
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from fewstep import Model, NoiseSchedule, TimeGrid, VarianceExploding, load_model
from fewstep.models.analytic import GaussianDenoiser
from fewstep.models.formats.folders import save_ours
from fewstep.models.tuned import Tuned
from fewstep.sampling.grid_table import GridTable

UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False, "num_class_embeds": 3}
LAW, SHAPE = VarianceExploding(0.05, 20.0), (1, 4, 4)


def toy(schedule: NoiseSchedule | None = None, folder: Path | None = None, shape: tuple[int, ...] = (1, 2, 2)) -> Model:
    """Return an analytic model without data."""
    exact = GaussianDenoiser(schedule or VarianceExploding(), torch.zeros(shape), torch.tensor(0.5))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return exact(x, t)

    return Model(network, exact.schedule, "sample", shape=shape, name="toy", folder=folder)


def tiny(folder: Path, seed: int = 0) -> Model:
    """Save and load a class-conditional model of random weights, whose labels matter."""
    torch.manual_seed(seed)
    network = UNet2DModel(**UNET)
    with torch.no_grad():
        network.class_embedding.weight.mul_(5)
    save_ours(folder, network, "edm(0.5)", LAW, SHAPE, 2)
    return load_model(folder)


def tuned(folder: Path, teacher: Model, guidance: float = 1.0, weights: Model | None = None, half: bool = False) -> Model:
    """Save and load a model as if tuned from ``teacher``, with the same or other weights."""
    network = (weights or teacher).network
    save_ours(folder, copy.deepcopy(network).half() if half else network, "edm(0.5)", LAW, SHAPE, 2)
    student = load_model(folder)
    grids = {2: TimeGrid(torch.tensor([20.0, 0.5, 0.05])), 96: TimeGrid.karras(LAW, 96)}
    GridTable("ddim", student.fingerprint, 1.0, LAW, grids).save(folder / "optimized" / "ddim")
    GridTable("unipc-3", student.fingerprint, 1.0, LAW, grids).save(folder / "optimized" / "unipc-3")
    Tuned(str(teacher.folder), teacher.fingerprint, guidance, "ddim", 2, "mean").save(folder)
    return load_model(folder)
