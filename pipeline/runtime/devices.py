"""Resolve the device of params.yaml and describe the hardware that results depend on."""

from __future__ import annotations

import torch

from pipeline.config.errors import ParamsError


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

    This is the number of processes and the GPU model, or the CPU instruction set that PyTorch uses.
    """
    cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return kind if processes == 1 else f"{processes} x {kind}"


def made_on(device: torch.device, processes: int = 1) -> str:
    """Describe the hardware and the PyTorch version that results depend on."""
    return f"{describe(device, processes)}, PyTorch {torch.__version__.partition('+')[0]}"
