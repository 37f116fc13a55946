"""Images noised by a `FewstepScheduler`, and its training targets."""

import math

import diffusers
import pytest
import torch
from tests.integrations.diffusers.test_scheduler import DPM, made, ramp, relative
from tests.integrations.diffusers.test_scheduler_calls import EPS, SD, noise

from fewstep import FewstepError, GridError
from fewstep.integrations.diffusers import FewstepScheduler


def test_noise_is_added_on_the_device_and_at_any_time():
    scheduler = made(DPM)
    for times in (scheduler.timesteps[3:4], torch.tensor(500), torch.tensor([1, 500, 300, 999]), torch.tensor([0.5])):
        noised = scheduler.add_noise(ramp(), ramp(down=True), times)
        assert (noised.shape, noised.dtype, noised.device) == (ramp().shape, torch.float32, ramp().device)
    theirs = diffusers.DDPMScheduler()
    times = torch.tensor([0, 333, 700, 999])
    torch.testing.assert_close(scheduler.add_noise(ramp(), ramp(down=True), times), theirs.add_noise(ramp(), ramp(down=True), times))
    velocity = theirs.get_velocity(ramp(), ramp(down=True), times)
    torch.testing.assert_close(scheduler.get_velocity(ramp(), ramp(down=True), times), velocity, rtol=1e-5, atol=1e-6)
    assert scheduler.add_noise(ramp().half(), ramp().half(), times).dtype == torch.float16


def test_a_picture_is_noised_to_the_level_asked_rather_than_to_that_of_the_held_time():
    scheduler = FewstepScheduler(**SD)
    scheduler.set_timesteps(sigmas=[20.0, 16.0, 1.0])
    clean, eps = noise(), noise(1)

    def noised(level):
        return (clean + level * eps) / math.sqrt(1 + level**2)

    assert relative(scheduler.add_noise(clean, eps, scheduler.timesteps[:1]), noised(20)) < EPS
    assert relative(scheduler.add_noise(clean, eps, scheduler.timesteps[2:]), noised(1)) < EPS
    scheduler.set_begin_index(1)  # of two levels with one time that of the start
    assert relative(scheduler.add_noise(clean, eps, scheduler.timesteps[1:2]), noised(16)) < EPS


@pytest.mark.parametrize("times", [1000, -1, [5, 1500], torch.tensor([-0.5])])
def test_a_picture_is_not_noised_at_a_time_that_the_network_does_not_have(times):
    for ask in (FewstepScheduler().add_noise, FewstepScheduler().get_velocity):
        with pytest.raises(GridError, match="timesteps lie between 0 and 999"):
            ask(noise(), noise(1), times)


@pytest.mark.parametrize(
    ("clean", "eps", "times", "says"),
    [
        (noise().long(), noise(1), 500, "floating point numbers, got shape .* of torch.int64"),
        (noise(), noise(1) + 0j, 500, "noise is .* of torch.complex64"),
        ([0.0], noise(1), 500, "floating point numbers, got a list"),
        (noise(), noise(1)[:, :1], 500, r"noise has shape \(2, 1, 4, 4\)"),
        (noise(count=3), noise(1), 500, r"noise has shape \(2, 3, 4, 4\)"),
        (noise(), noise(1), [1, 2, 3], "one time, or one for each of 2 samples, got 3"),
    ],
)
def test_a_picture_is_noised_by_noise_of_its_own_shape(clean, eps, times, says):
    for ask in (FewstepScheduler().add_noise, FewstepScheduler().get_velocity):
        with pytest.raises(FewstepError, match=says):
            ask(clean, eps, times)


def test_one_picture_is_noised_for_a_batch_of_noises():
    """As inpainting pipelines keep one."""
    noised = FewstepScheduler().add_noise(noise(count=1), noise(1), torch.tensor([500]))
    assert torch.equal(noised, FewstepScheduler().add_noise(noise(count=1).repeat(2, 1, 1, 1), noise(1), 500))
