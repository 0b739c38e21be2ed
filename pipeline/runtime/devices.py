"""Resolve the device of params.yaml and describe the hardware that results depend on."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys

import torch

from pipeline.config.errors import ParamsError
from pipeline.runtime.determinism import CPUINFO, MARK, is_x86

MAKERS = {
    "GenuineIntel": "Intel",
    "AuthenticAMD": "AMD",
    "HygonGenuine": "Hygon",
    "CentaurHauls": "Centaur",
    "Shanghai": "Zhaoxin",
}
_NOT_PART_OF_A_NAME = re.compile(r"\((?:R|TM|C)\)|[®™©]|@.*|\b\d+([.,]\d+)?\s*[GM]Hz\b|[^\w.+/ -]", re.IGNORECASE | re.ASCII)


def resolve_device(name: str) -> torch.device:
    """Resolve `name` (auto, cpu, cuda, cuda:N) on this machine. Raises ParamsError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParamsError([f"params.yaml: device = {name}: there is no such GPU here; use auto or cpu"])
    return device


def resolve_devices(name: str) -> list[torch.device]:
    """Resolve `name` to a list of devices: all GPUs for auto and cuda, one GPU for cuda:N.

    Raises ParamsError if there is no such device.
    """
    device = resolve_device(name)
    if device.type == "cpu" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def own_device(name: str, local_rank: int | None) -> torch.device:
    """Resolve `name` in the process with this `local_rank` on its machine; None without torchrun.

    Each process has its own GPU. Raises ParamsError if there are too few.
    """
    device = resolve_device(name)
    if local_rank is None or device.type == "cpu":
        return device
    if device.index is not None:
        raise ParamsError([f"params.yaml: device = {name}: is one GPU for several processes; use auto or cuda"])
    if local_rank >= (count := torch.cuda.device_count()):
        message = f"--nproc-per-node: is at least {local_rank + 1}, but there are {count} GPUs here; each process needs its own"
        raise ParamsError([message])
    return torch.device("cuda", local_rank)


def describe(device: torch.device, processes: int = 1) -> str:
    """Describe the hardware that results depend on.

    This is the number of processes and the GPU model, or the CPU model and the instruction set that PyTorch uses. With
    `deterministic: true`, results do not depend on the model of an x86-64 CPU, so it is not named.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({_cpu()})"
    return kind if processes == 1 else f"{processes} x {kind}"


def made_on(device: torch.device, processes: int = 1) -> str:
    """Describe the hardware and the PyTorch version that results depend on."""
    return f"{describe(device, processes)}, PyTorch {torch.__version__.partition('+')[0]}"


def _cpu() -> str:
    if MARK not in os.environ:
        return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"
    return "deterministic" if is_x86() else f"deterministic, {platform.machine()}"


@functools.cache
def cpu_model() -> str:
    """Name maker and model of this machine's CPU; the architecture if the system does not say."""
    try:
        name = tidy(*_maker_and_model())
    except (OSError, ValueError, subprocess.SubprocessError):
        name = ""
    return name or tidy("", platform.machine()) or "unknown"


def tidy(maker: str, model: str) -> str:
    """Join maker and model of a CPU without trademarks, frequencies and repeated spaces."""
    model = " ".join(_NOT_PART_OF_A_NAME.sub(" ", model).split())
    model = re.sub(r" CPU$", "", model)
    maker = MAKERS.get(maker.strip(), "")
    return model if not model or maker.lower() in model.lower() else f"{maker} {model}"


def _maker_and_model() -> tuple[str, str]:
    """Raises OSError, ValueError or SubprocessError if the system does not say."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return "", subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    if not CPUINFO.exists():
        return "", platform.processor()
    first, _, _ = CPUINFO.read_text(encoding="utf-8", errors="replace").lstrip().partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    entries = {key.strip(): value.strip() for key, _, value in pairs}
    model = entries.get("model name", "")
    if model.lower() in ("", "unknown"):
        # x86 numbers its models by family and model; ARM by implementer and part.
        numbers = {"family": "cpu family", "model": "model", "implementer": "CPU implementer", "part": "CPU part"}
        model = " ".join(f"{name} {entries[key]}" for name, key in numbers.items() if key in entries)
    return entries.get("vendor_id", ""), model
