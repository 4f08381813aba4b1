"""The machine: what a run's numbers depend on, its peak of memory, its energy.

Whatever cannot be read here is None. Nothing in it knows what is being measured.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

# the instructions that decide how fast half precision and small integers are
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve")
RAPL = Path("/sys/class/powercap")
Counter = tuple[int, int]  # microjoules, and where the counter starts again from 0


def provenance(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = ("specdec", "torch", "transformers", "triton")
    out: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed_since": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        # torch says itself which build it is
        "versions": {name: version(name) for name in packages} | {"torch": torch.__version__},
        # with scikit-learn installed assisted decoding moves its confidence threshold during a call
        "scikit_learn": importlib.util.find_spec("sklearn") is not None,
        "threads": torch.get_num_threads(),
        **processor(),
    }
    if device.type == "cuda":
        out["device"] = torch.cuda.get_device_name(device)
        out["cuda"] = torch.version.cuda
    return out


def processor() -> dict[str, Any]:
    """Name of the processor, its cores, and those of its instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"processor": platform.processor() or platform.machine(), "flags": None}
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    known = set(fields.get("flags", fields.get("Features", "")).split())
    cores = sum(line.startswith("processor") for line in lines)
    name = fields.get("model name", platform.machine())
    return {"processor": name, "cores": cores, "flags": [flag for flag in FLAGS if flag in known]}


def version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str:
    """What git says of the folder of this file; empty where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


class Meter:
    """Peak memory and energy between ``start`` and ``stop``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        self._energy: list[Counter] | None = None

    def start(self) -> None:
        """Forget what was freed, reset the peak, read the counters."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            give_back_memory()
            self._before = status("VmRSS") if reset_peak() else None
        self._energy = self._read()

    def stop(self) -> tuple[int | None, float | None]:
        """Bytes by which the peak exceeded the start; joules."""
        energy, peak = self._read(), None
        if self._before is not None:
            if self._device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self._device) - self._before
            else:
                peak = max(status("VmHWM") - self._before, 0)
        joules = None
        if self._energy is not None and energy is not None:
            pairs = zip(self._energy, energy, strict=True)
            joules = sum((after - before) % most for (before, most), (after, _) in pairs) / 1e6
        return peak, joules

    def _read(self) -> list[Counter] | None:
        """The graphics card's counter, or one a processor package."""
        if self._device.type == "cuda":
            return card_energy(self._device)
        try:
            packages = [zone for zone in sorted(RAPL.glob("intel-rapl:*")) if zone.name.count(":") == 1]
            names = ("energy_uj", "max_energy_range_uj")
            counters = [tuple(int((zone / name).read_text()) for name in names) for zone in packages]
            return counters or None
        except OSError:  # readable by root only on most systems
            return None


def card_energy(device: torch.device) -> list[Counter] | None:
    """Energy since the driver was loaded, through NVML (package nvidia-ml-py); not run on a GPU yet."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return [(1000 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 2**63)]
    except Exception:  # missing package, driver or counter: all the same here
        return None


def give_back_memory() -> None:
    """Return freed memory to the system, else the next run would grow into it unseen."""
    with suppress(AttributeError, OSError, TypeError):  # a C library that has no such function
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Let the peak of resident memory begin anew (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))
