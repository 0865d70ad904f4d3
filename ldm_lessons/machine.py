"""What this machine is: the device to compute on, where the course's data lies, and what to expect, in plain words."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "half": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def data_dir() -> Path:
    """The folder of the course's data: the environment variable LDM_LESSONS_DATA, else `data` beside the package."""
    own = os.environ.get("LDM_LESSONS_DATA")
    return Path(own).expanduser() if own else Path(__file__).resolve().parent.parent / "data"


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, or the best there is: cuda, else mps, else cpu.

    Raises ValueError for a name that torch does not know or a device that this machine does not have.
    """
    here = [kind for kind, there in (("cuda", _has_cuda()), ("mps", _has_mps()), ("cpu", True)) if there]
    if name is None:
        return torch.device(here[0])
    kind, _, number = str(name).partition(":")
    if kind not in ("cuda", "mps", "cpu") or (number and not number.isdigit()):
        raise ValueError(f"unknown device {str(name)!r}: choose {' or '.join(here)}, or None for the best one.")
    if kind not in here:
        raise ValueError(f"this machine has no {kind} device: choose {' or '.join(here)}, or None for the best one.")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"this machine has no {name} device: its last is cuda:{torch.cuda.device_count() - 1}.")
    return torch.device(str(name))


def pick_dtype(name: str | torch.dtype | None = None, device: str | torch.device | None = None) -> torch.dtype:
    """The dtype of that name, or the one that suits the device: float16 on cuda, float32 elsewhere.

    Raises ValueError for a dtype that pictures cannot be made in.
    """
    if name is None:
        return torch.float16 if pick_device(device).type == "cuda" else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"unknown dtype {str(name)!r}: choose float32, float16 or bfloat16, or None for the best one.")
    return dtype


def pick_precision(device: str | torch.device | None = None) -> str:
    """The mixed precision in which the device trains fastest, by Accelerate's names: "bf16", "fp16" or "no".

    bf16 where the GPU or the processor itself computes in it (one that has to imitate it is slower than with float32),
    fp16 on older NVIDIA GPUs. Raises ValueError as `pick_device`.
    """
    kind = pick_device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if kind == "cpu" and _cpu_has_bf16() else "no"


@dataclass(frozen=True)
class Machine:
    """What `describe` found; `str` of it, or `lines`, says so in plain words."""

    device: str  # cuda, mps or cpu
    device_name: str
    cores: int
    memory_gb: float
    gpu_memory_gb: float | None
    versions: dict[str, str]
    colab: bool

    @property
    def lines(self) -> list[str]:
        """One sentence a line: device, memory, versions, what will be slow."""
        cores = f"{self.cores} core" + "s" * (self.cores != 1)
        own = f"{self.memory_gb:.0f} GB of memory"
        if self.device == "cpu":
            found = [f"Device: the processor, with {cores} and {own}; no GPU was found."]
        else:
            gpu = "" if self.gpu_memory_gb is None else f" with {self.gpu_memory_gb:.0f} GB of its own"
            found = [f"Device: {self.device_name}{gpu}; besides it {cores} and {own}."]
        found.append("Versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".")
        return found + [self.expect]

    @property
    def expect(self) -> str:
        """What will be slow here, in a sentence."""
        if self.memory_gb < 4:
            return "What to expect: the lessons need about 3 GB of memory, so close other programs first."
        if self.device == "cpu":
            return (
                "What to expect: every lesson runs here. The pocket model makes a picture in seconds, training in a "
                "lesson takes up to a minute and a half, and real Stable Diffusion (lesson 12) minutes a picture."
            )
        return "What to expect: every lesson runs here; real Stable Diffusion (lesson 12) takes seconds a picture."

    def __str__(self) -> str:
        return "\n".join(self.lines)


def describe() -> Machine:
    """Look at this machine: device, cores, memory, versions. Nothing in it is timed, and it holds no paths."""
    device = pick_device()
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    name = gpu.name if gpu else {"mps": "the Apple GPU", "cpu": "the processor"}[device.type]
    versions = {"Python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "datasets", "accelerate"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return Machine(device.type, name, cores(), memory_gb(), gpu and gpu.total_memory / 2**30, versions, on_colab())


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float:
    """The memory that this process may use, in GiB."""
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's own limit
    return min(limits) / 2**30


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, in GiB."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    # on Linux first of all; ru_maxrss there may be that of the process that started this one
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def on_colab() -> bool:
    """Whether this is a Colab notebook."""
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _cpu_has_bf16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
