"""What a run costs: the network's evaluations and time, and the most memory that was held."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.schedule import NoiseSchedule

__all__ = ["PeakMemory", "Timed", "now"]

PROCESS = Path("/proc/self")


def now(device: torch.device) -> float:
    """Seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Timed:
    """A denoiser that knows how long it took, on how many samples it was evaluated, and at which times."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.seconds, self.evaluated = denoiser, 0.0, 0
        self.times: list[float] = []  # of a batch the first sample's

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        begin = now(x.device)
        x0 = self.denoiser(x, t, cond)
        self.seconds += now(x.device) - begin
        self.evaluated += len(x)
        self.times.append(float(t.flatten()[0]))
        return x0


class PeakMemory:
    """The most bytes held from its making to `bytes`.

    On CUDA those that torch has allocated there. On the CPU the growth of the process's peak resident size: Linux can be told to begin
    that anew, and free memory is first given back, so that what an earlier run left behind neither hides nor adds anything.
    Elsewhere a peak is that of the whole process's life and would say nothing of one run: None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu" and _give_back():
            self.before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """So far; None if it cannot be measured here."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = None if self.before is None else _resident("VmHWM")
        return None if peak is None or self.before is None else max(0, peak - self.before)


def _give_back() -> bool:
    """Return free memory to the system and begin the peak anew; whether that could be done."""
    gc.collect(1)  # not the old generation: that takes longer than a row
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):  # another C library, another system, no permission
        return False
    return True


def _resident(entry: str) -> int | None:
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)
