"""Measure what a run costs: the network's evaluations and time, and the peak memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.schedule import NoiseSchedule

__all__ = ["PeakMemory", "TimedDenoiser", "TimedFlowMap", "machine_of", "now", "timed"]

PROCESS = Path("/proc/self")


def machine_of(device: torch.device) -> dict[str, Any]:
    """Return what times depend on: the device with its processor, the threads, and the versions of torch and Python."""
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def now(device: torch.device) -> float:
    """Return the time in seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Counted:
    """Counts of a network's calls.

    Attributes:
        seconds: spent in them.
        evaluated: samples evaluated.
        times: the time of each call, of its first sample.
    """

    def __init__(self) -> None:
        self.seconds, self.evaluated = 0.0, 0
        self.times: list[float] = []

    def count(self, x: Tensor, t: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Make a call for the states ``x [B, *D]`` at ``t`` and count it."""
        begin = now(x.device)
        answer = call()
        self.seconds += now(x.device) - begin
        self.evaluated += len(x)
        self.times.append(float(t.flatten()[0]))
        return answer


class TimedDenoiser(_Counted):
    """A denoiser whose evaluations are counted and timed.

    It has no domain: a run of it ends before the fold of a reflected model, which the benchmark makes itself.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.count(x, t, lambda: self.denoiser(x, t, cond))


class TimedFlowMap(_Counted, FlowMap):
    """A flow map whose jumps are counted and timed."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        self.flow_map = flow_map

    @property
    def schedule(self) -> NoiseSchedule:
        return self.flow_map.schedule

    @property
    def definition(self) -> tuple[Any, ...]:
        return self.flow_map.definition

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.count(x, s, lambda: self.flow_map(x, s, t, cond))

    @property
    def anywhere(self) -> bool:
        return self.flow_map.anywhere

    def arithmetic(self, t: Tensor) -> float | None:
        return self.flow_map.arithmetic(t)

    def check(self, t: Tensor) -> None:
        self.flow_map.check(t)


def timed(denoiser: Denoiser | FlowMap) -> TimedDenoiser | TimedFlowMap:
    """Wrap a denoiser or a flow map so that its calls are counted and timed."""
    return TimedFlowMap(denoiser) if isinstance(denoiser, FlowMap) else TimedDenoiser(denoiser)


class PeakMemory:
    """The peak memory from construction to `bytes`.

    On CUDA it is what torch allocates there. On the CPU it is the growth of the process's peak resident size: Linux can restart that
    measurement, and free memory is returned first, so that an earlier run neither hides nor adds anything. Elsewhere the peak covers the
    whole life of the process and says nothing about one run: None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu" and _restart():
            self.before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """Return the peak so far in bytes; None if it cannot be measured here."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = None if self.before is None else _resident("VmHWM")
        return None if peak is None or self.before is None else max(0, peak - self.before)


def _restart() -> bool:
    """Return free memory to the system and restart the peak; False where that cannot be done."""
    gc.collect(1)  # not the old generation: that takes longer than a row
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):  # another C library, another system, no permission
        return False
    return True


def _resident(entry: str) -> int | None:
    """Read a size of this process in bytes from its status, ``VmRSS`` or ``VmHWM``."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)
