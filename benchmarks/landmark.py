"""Landmark attention against dense attention: seconds and memory of a forward and backward pass, by length.

python -m benchmarks.landmark writes benchmarks/results/landmark_<device>.json and prints a table. One head of 64 channels, one
sequence. Every measurement has a process of its own, so that its peak memory is its own; the two kinds take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from tabulate import tabulate

from cat.attention import attend
from cat.landmark import landmark_attend
from pipeline.compute import describe, resolve_device
from pipeline.files import whole, write_json

RESULTS = Path(__file__).parent / "results"
CHANNELS, TOP, REPEATS = 64, 2, 3


def block_of(length: int) -> int:
    """Tokens of a block: the power of two at or below the square root, where landmarks and blocks cost alike."""
    return 1 << (length.bit_length() - 1) // 2


def measure(kind: str, length: int, device: str, threads: int) -> dict[str, Any]:
    """The median seconds of a pass and the bytes that it needs at its peak, above what was there before."""
    torch.set_num_threads(threads)
    q, k, v, gradient = torch.randn(4, 1, 1, length, CHANNELS, device=device).unbind()
    streams = [x.requires_grad_() for x in (q, k, v)]
    block = block_of(length)
    scale = CHANNELS**-0.5
    if kind == "dense":
        run = partial(attend, scale=scale)
    else:
        run = partial(landmark_attend, s=streams[1], scale=scale, block=block, top=TOP, reach=3)
    cuda = device == "cuda"
    seconds = []
    before = peak_memory()
    for _ in range(REPEATS + 1):  # the first is for warming up
        start = time.perf_counter()
        run(*streams).backward(gradient)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory() - before
    return {"kind": kind, "length": length, "block": block, "seconds": median(seconds[1:]), "bytes": peak}


def peak_memory() -> int:
    """Bytes that this process has had at most. On Linux from /proc: what getrusage says begins at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@click.command()
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--threads", default=1, help="Threads of a CPU.")
@click.option("--longest", default=32768, help="Length to go up to, from 1024 in doublings.")
def main(device: str, threads: int, longest: int) -> None:
    """Measure landmark and dense attention at every length; write the results and print a table."""
    where = resolve_device(device)
    rows, length = [], 1024
    while length <= longest:
        for kind in ("dense", "landmark"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (kind, length, where.type, threads)))
        length *= 2
    name = describe(where)
    about = {"device": name, "threads": threads, "torch": torch.__version__, "channels": CHANNELS, "top": TOP}
    path = RESULTS / f"landmark_{'_'.join(''.join(c if c.isalnum() else ' ' for c in name.lower()).split())}.json"
    with whole(path) as part:
        write_json(part, {**about, "rows": rows})
    click.echo(table(json.loads(path.read_text())))


def table(results: dict[str, Any]) -> str:
    """A row a length: seconds and megabytes of both, and how many times dense attention takes what landmark attention does."""
    dense, landmark = ([r for r in results["rows"] if r["kind"] == kind] for kind in ("dense", "landmark"))
    rows = [
        [d["length"], m["block"], d["seconds"], m["seconds"], d["seconds"] / m["seconds"], d["bytes"] / 1e6, m["bytes"] / 1e6]
        for d, m in zip(dense, landmark, strict=True)
    ]
    head = ["tokens", "block", "dense, s", "landmark, s", "dense / landmark", "dense, MB", "landmark, MB"]
    return f"{results['device']}, {results['threads']} thread\n\n" + tabulate(rows, head, floatfmt=".3g", tablefmt="github")


if __name__ == "__main__":
    main()
