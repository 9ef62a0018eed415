"""The NVIDIA management library, asked in such a way that it may refuse any question.

What a GPU, its driver or a container does not support is left out for good after the first
refusal, without a warning: unified memory has no memory counter (DGX Spark), a MIG slice no power.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: The questions: our name → what the library answers, in plain units: shares, bytes, watts,
#: degrees Celsius, clocks in Hz, joules since the driver was loaded, and a bit mask of the reasons
#: for which clocks are lower than they could be.
READINGS: Mapping[str, Callable[[Any, Any], float]] = {
    "utilization": lambda n, gpu: n.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "memory_used": lambda n, gpu: _used(n.nvmlDeviceGetMemoryInfo(gpu)),
    "power": lambda n, gpu: n.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature": lambda n, gpu: n.nvmlDeviceGetTemperature(gpu, n.NVML_TEMPERATURE_GPU),
    "sm_clock": lambda n, gpu: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_SM) * 1e6,
    "memory_clock": lambda n, gpu: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_MEM) * 1e6,
    "energy": lambda n, gpu: n.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
    "reasons": lambda n, gpu: _reasons(n)(gpu),
}

#: Bits of the mask (nvml.h, nvmlClocksEventReasons).
REASONS: Mapping[str, int] = {
    "idle": 0x1,
    "application_clocks": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake": 0x80,
    "display_clocks": 0x100,
}


def library() -> Any | None:
    """The module `pynvml` of nvidia-ml-py; None without it, or without an NVIDIA driver here."""
    return import_quietly() if driver_is_here() else None


def driver_is_here() -> bool:
    """Whether this system has a driver that the library could ask; costs three look-ups."""
    places = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")  # the last is that of WSL
    return any(Path(place).exists() for place in places)


def import_quietly() -> Any | None:
    """`pynvml`, if it is installed: its older name announces its end at every import."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            return None
    return pynvml


class Gpu:
    """One GPU that is asked again and again. `nvml` is initialised; `id` is an index ("0"), or a
    UUID ("GPU-…", "MIG-…"). Raises the library's NVMLError if there is no such GPU."""

    def __init__(self, nvml: Any, id: str) -> None:
        self.id = id
        self._nvml = nvml
        self._handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(id))
            if id.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(id)
        )
        self._asked: dict[str, Callable[[Any, Any], float]] = dict(READINGS)
        self._known: set[str] = set()
        self._tells_processes = True

    def read(self) -> dict[str, float]:
        """All readings that this GPU gives; NaN for one that failed for once."""
        found = {}
        for name, question in list(self._asked.items()):
            value = self._answer(question)
            if value is not None:
                self._known.add(name)
                found[name] = value
            elif name in self._known:
                found[name] = math.nan
            else:
                del self._asked[name]
        return found

    def processes(self) -> tuple[int, ...] | None:
        """Ids of the processes that compute on it; None if it does not tell.

        Inside a container they are those of the host, of this container, or none.
        """
        if not self._tells_processes:
            return None
        try:
            return tuple(
                int(process.pid)
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            )
        except (self._nvml.NVMLError, AttributeError):
            self._tells_processes = False
            return None

    def facts(self) -> dict[str, Any]:
        """`name`, and as far as it tells: `power_limit` (watts), `max_sm_clock` (Hz)."""
        n, gpu = self._nvml, self._handle
        name = self._answer(lambda n, gpu: n.nvmlDeviceGetName(gpu))
        text = name.decode() if isinstance(name, bytes) else name
        limits = policy(n, gpu)
        return {"id": self.id, "name": text, **limits}

    def _answer(self, question: Callable[[Any, Any], Any]) -> Any:
        try:
            return question(self._nvml, self._handle)
        except (self._nvml.NVMLError, AttributeError):
            return None


def policy(nvml: Any, handle: Any) -> dict[str, float]:
    """How fast a GPU may run: `power_limit` (watts) in force, `max_sm_clock` (Hz)."""
    found = {}
    questions: Mapping[str, Callable[[], float]] = {
        "power_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "max_sm_clock": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
    }
    for name, question in questions.items():
        try:
            found[name] = float(question())
        except (nvml.NVMLError, AttributeError):
            continue
    return found


def _used(memory: Any) -> float:
    """Bytes in use. Some drivers answer with zeros where memory is unified."""
    if not memory.total:
        raise AttributeError("no memory of its own")
    return float(memory.used)


def _reasons(nvml: Any) -> Callable[[Any], float]:
    """The question for reasons, under its name of today or that of older libraries."""
    today = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    return today or nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # type: ignore[no-any-return]
