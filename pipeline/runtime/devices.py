"""Devices: what params.yaml names, and what results depend on."""

from __future__ import annotations

import torch

from pipeline.config.errors import ParamsError


def resolve_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) stands for here. Raises ParamsError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParamsError([f"params.yaml: device = {name}: there is no such GPU here; use auto or cpu"])
    return device


def resolve_devices(name: str) -> list[torch.device]:
    """All devices that `name` stands for here: every GPU for auto and cuda, one for cuda:N. Raises ParamsError for none."""
    device = resolve_device(name)
    if device.type == "cpu" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def own_device(name: str, number: int | None) -> torch.device:
    """The device that `name` stands for in the process with this number on its machine; None where it is the only one.

    Each process has a GPU of its own. Raises ParamsError where there is none for it.
    """
    device = resolve_device(name)
    if number is None or device.type == "cpu":
        return device
    if device.index is not None:
        raise ParamsError([f"params.yaml: device = {name}: is one GPU for several processes; use auto or cuda"])
    if number >= (count := torch.cuda.device_count()):
        raise ParamsError([f"--nproc-per-node: is {number + 1} at least, and there are {count} GPUs here, one for each process"])
    return torch.device("cuda", number)


def describe(device: torch.device, processes: int = 1) -> str:
    """What results depend on: the kind of GPU, or the instruction set that PyTorch uses on this CPU; and how many of them."""
    cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return kind if processes == 1 else f"{processes} x {kind}"


def made_on(device: torch.device, processes: int = 1) -> str:
    """`describe`, and by which PyTorch."""
    return f"{describe(device, processes)}, PyTorch {torch.__version__.partition('+')[0]}"
