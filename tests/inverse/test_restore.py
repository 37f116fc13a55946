"""`restore`: what it returns and counts, folders that continue, and what it refuses."""

from pathlib import Path

import pytest
import torch
from tests.problems import DSNO

import fewstep
from fewstep import ArtifactError, ModelError, Restoration, Sampler, SolverError, restore
from fewstep.inverse.measurements import Average, CircularBlur, Compose, Mask, Measurement, Nonlinear
from fewstep.runtime.errors import FewstepError


@pytest.fixture(scope="module")
def model() -> fewstep.Model:
    return fewstep.load_model("digits-edm")


Y = torch.linspace(-1, 1, 16).reshape(1, 4, 4)


def test_samples_with_mean_spread_and_misfit(model: fewstep.Model) -> None:
    found = restore(model, Average(2), Y, 0.05, seeds=range(3))
    assert found.samples.shape == (3, 1, 8, 8) and found.y.shape == (1, 4, 4)
    torch.testing.assert_close(found.mean, found.samples.mean(0))
    torch.testing.assert_close(found.spread, found.samples.std(0))
    wanted = (Y - Average(2)(found.samples)).flatten(1).square().mean(1).sqrt() / 0.05
    torch.testing.assert_close(found.misfit, wanted)
    assert (found.card["evaluations"], found.card["backward passes"]) == (10, 0)
    assert repr(found).startswith("Restoration(3 samples of (1, 8, 8), misfit")
    assert float(restore(model, Average(2), Y, 0.05, seeds=[0]).spread.max()) == 0


def test_a_seed_gives_the_same_sample_in_any_batch(model: fewstep.Model) -> None:
    one = restore(model, Average(2), Y, 0.05, seeds=[5]).samples
    torch.testing.assert_close(
        restore(model, Average(2), Y, 0.05, seeds=[2, 5, 9], batch=2).samples[1:2], one, rtol=1e-3, atol=1e-3
    )  # differences of answers


def test_guidance_and_conditions_compose(model: fewstep.Model) -> None:
    plain = restore(model, Average(2), Y, 0.05, seeds=[0]).samples
    three = restore(model, Average(2), Y, 0.05, seeds=[0], cond=torch.tensor([3])).samples
    guided = restore(model, Average(2), Y, 0.05, seeds=[0], cond=torch.tensor([3]), guidance=2.0).samples
    assert not torch.allclose(plain, three) and not torch.allclose(three, guided)


def test_counts_of_evaluations(model: fewstep.Model) -> None:
    assert restore(model, Average(2), Y, 0.05, nfe=12, method="moments:steps=2", seeds=[0]).card["evaluations"] == 12
    sampler = Sampler.build("ddim:eta=1", "karras", model.schedule, nfe=6)
    assert restore(model, Average(2), Y, 0.05, nfe=12, solver=sampler, seeds=[0]).card["evaluations"] == 12
    with pytest.raises(SolverError, match="12 network evaluations, not 10"):
        restore(model, Average(2), Y, 0.05, solver=sampler, seeds=[0])
    with pytest.raises(SolverError, match="as 8 or 10, not 9"):
        restore(model, Average(2), Y, 0.05, nfe=9)
    with pytest.raises(SolverError, match="a multiple of 11, as 11, not 10"):
        restore(model, Average(2), Y, 0.05, method="constrained")


def test_a_folder_is_loaded_continued_and_never_replaced(model: fewstep.Model, tmp_path: Path) -> None:
    out = tmp_path / "restored"
    seen = list[int]()

    def stop(done: int, note: str) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(model, Average(2), Y, 0.05, seeds=range(6), batch=2, out=out, on_progress=stop)
    assert len(list(out.glob("parts-*/*"))) == 2 and not (out / "restoration.json").exists()
    with pytest.raises(ArtifactError, match="another command"):
        restore(model, Average(2), -Y, 0.05, seeds=range(6), batch=2, out=out)
    found = restore(model, Average(2), Y, 0.05, seeds=range(6), batch=2, out=out)
    whole = restore(model, Average(2), Y, 0.05, seeds=range(6), batch=2)
    torch.testing.assert_close(found.samples, whole.samples, rtol=0, atol=0)
    assert not list(out.glob("parts-*")) and (out / "README.md").exists()
    again = Restoration.load(out)
    torch.testing.assert_close(again.samples, whole.samples, rtol=0, atol=0)
    assert again.card == found.card
    before = (out / "restoration.safetensors").stat().st_mtime_ns
    torch.testing.assert_close(restore(model, Average(2), Y, 0.05, seeds=range(6), batch=2, out=out).samples, whole.samples, rtol=0, atol=0)
    assert (out / "restoration.safetensors").stat().st_mtime_ns == before
    for change in (
        {"y": Y + 0.1},
        {"noise": 0.06},
        {"measurement": Average(2) @ Mask(torch.ones(1, 8, 8))},
        {"method": "projection", "nfe": 5},
    ):
        asked = {"measurement": Average(2), "y": Y, "noise": 0.05, "seeds": range(6), "batch": 2, **change}
        with pytest.raises(ArtifactError, match="another command"):
            restore(model, asked.pop("measurement"), asked.pop("y"), asked.pop("noise"), out=out, **asked)


class Scaled(Measurement):
    """An operator of one's own."""

    def __init__(self, back: float = 1.0) -> None:
        self.back = back

    def __call__(self, x0: torch.Tensor) -> torch.Tensor:
        return x0 * gain()

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        return self.back * y * gain()


def gain() -> float:
    return 1.0


def test_the_code_of_an_operator_is_part_of_a_request(model: fewstep.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(1, 8, 8)
    restore(model, Scaled(), y, 0.1, seeds=[0], out=tmp_path / "out")
    restore(model, Scaled(), y, 0.1, seeds=[0], out=tmp_path / "out")
    monkeypatch.setattr(Scaled, "__call__", lambda self, x0: 1.0 * x0)
    with pytest.raises(ArtifactError, match="another command"):
        restore(model, Scaled(), y, 0.1, seeds=[0], out=tmp_path / "out")


def test_a_damaged_folder_says_what_to_remove(model: fewstep.Model, tmp_path: Path) -> None:
    restore(model, Average(2), Y, 0.05, seeds=[0], out=tmp_path / "out")
    (tmp_path / "out" / "restoration.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"remove .*restoration.json"):
        restore(model, Average(2), Y, 0.05, seeds=[0], out=tmp_path / "out")
    (tmp_path / "out" / "restoration.json").unlink()
    assert restore(model, Average(2), Y, 0.05, seeds=[0], out=tmp_path / "out").samples.shape == (1, 1, 8, 8)


def test_files_of_others_are_left_alone(model: fewstep.Model, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds README.md"):
        restore(model, Average(2), Y, 0.05, seeds=[0], out=tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_saved_sampler_of_the_model(model: fewstep.Model) -> None:
    assert restore(model, Average(2), Y, 0.05, nfe=10, solver="fitted", seeds=[0]).samples.shape == (1, 1, 8, 8)


@pytest.mark.slow
def test_through_a_decoder(model: fewstep.Model) -> None:
    """A model of latents is measured through its decoder, which is part of the operator."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(1, 1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=1, layers_per_block=1,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    decode = Nonlinear(lambda z: vae.decode(z).sample)
    truth = decode(fewstep.sample(model, "ddim", nfe=4, seeds=[1]))
    assert truth.shape == (1, 1, 16, 16)
    found = restore(model, Compose(Average(2), decode), Average(2)(truth)[0], 0.02, seeds=range(3), nfe=20)
    blind = fewstep.sample(model, "ddim", nfe=10, seeds=range(3))
    with torch.no_grad():
        assert float(found.misfit.max()) < 0.5 * float((Average(2)(decode(blind) - truth)).square().mean().sqrt() / 0.02)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"y": Y[None]}, ModelError, "one measurement"),
        ({"y": torch.zeros(1, 3, 3)}, ModelError, "y has shape"),
        ({"seeds": []}, ModelError, "seeds=range"),
        ({"seeds": [1, 1]}, ModelError, "the same"),
        ({"batch": 0}, ModelError, "batches of at least 1"),
        ({"nfe": 0}, SolverError, "whole number"),
        ({"nfe": 2.5}, SolverError, "whole number"),
        ({"method": "best"}, ModelError, "moments"),
        ({"solver": "euler-maruyama"}, SolverError, "unknown solver"),
        ({"solver": "ddim", "grid": "cosine"}, FewstepError, "unknown grid"),
        ({"cond": torch.tensor([99])}, ModelError, "labels 0 to 9"),
        ({"guidance": "much"}, ModelError, "a scale"),
        ({"noise": None}, ModelError, "noise=0.05"),
        ({"model": "digits-edm"}, ModelError, "a fewstep.Model"),
        ({"model": fewstep.GaussianDenoiser(fewstep.VPLinear(), torch.zeros(1), torch.ones(1))}, ModelError, "make a Model of it"),
        ({"steps": 3}, FewstepError, "steps"),
        ({"guidance": 2.0}, ModelError, "pass cond="),
        ({"measurement": CircularBlur(torch.ones(2, 3, 3)), "y": torch.zeros(1, 8, 8)}, ModelError, "keeps the batch"),
        ({"measurement": Scaled(4.0), "y": torch.zeros(1, 8, 8)}, ModelError, "transpose is none"),
        ({"measurement": Scaled(-1.0), "y": torch.zeros(1, 8, 8)}, ModelError, "transpose is none"),
        (
            {"solver": Sampler.build("ddim", "karras", fewstep.load_model("digits-edm").schedule, nfe=5), "grid": "angle"},
            FewstepError,
            "leave grid",
        ),
        ({"method": "dps", "nfe": 4, "solver": "unipc-2"}, SolverError, "use ddim"),
        ({"method": "spectral", "seeds": [0, 1], "cond": torch.tensor([3, 7])}, ModelError, "have several"),
    ],
)
@pytest.mark.every(2)
def test_refusals(model: fewstep.Model, tmp_path: Path, options: dict, error: type[Exception], said: str) -> None:
    asked = {"model": model, "measurement": Average(2), "y": Y, "noise": 0.05, "out": tmp_path / "out", **options}
    with pytest.raises(error, match=said):
        restore(asked.pop("model"), asked.pop("measurement"), asked.pop("y"), **asked)
    assert not (tmp_path / "out").exists()


def test_a_student_is_refused() -> None:
    with pytest.raises(ModelError, match="student"):
        restore(fewstep.load_model(DSNO), Average(2), Y, 0.05)
