"""The rows of the suite; results/<device>.json has their results, results/<device>.md the same as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.attention import biased, landmark
from benchmarks.convolution import long_convolution, qkv_convolutions, short_convolution
from benchmarks.data import data
from benchmarks.generation import generation
from benchmarks.masks import masks
from benchmarks.measure import REPEATS, Benchmark, NotRun, Place
from benchmarks.recurrence import recurrent_steps, scan
from benchmarks.startup import startup
from benchmarks.training import replicas, step, text
from pipeline.runtime.devices import describe
from pipeline.storage.files import atomic_write, read_json, write_json

RESULTS = Path(__file__).parent / "results"
CONDITIONS = ("threads", "torch", "repeats")
"""Settings that a figure depends on, besides the device."""

SUITE: dict[str, Benchmark] = {
    "step_8192": step(8192, target=30),
    "step_256": step(256, target=6),
    "text_128": text(128, target=0.9),
    "text_1024": text(1024, target=1.0),
    "qkv_convolutions_128": qkv_convolutions(128),
    "qkv_convolutions_512": qkv_convolutions(512),
    "qkv_convolutions_1024": qkv_convolutions(1024),
    "qkv_convolutions_4096": qkv_convolutions(4096),
    "short_convolution": short_convolution(),
    "long_convolution": long_convolution(),
    "biased": biased(),
    "landmark": landmark(),
    "scan": scan(),
    "recurrent_steps": recurrent_steps(),
    "generation": generation(),
    "masks": masks(),
    "data": data(),
    "replicas": replicas(),
    "startup": startup(),
}


def measure(suite: Mapping[str, Benchmark], names: list[str], place: Place, progress: Callable[[str], None]) -> Path:
    """Run the named rows and write each when it is done; results of other rows stay in the files."""
    device = describe(torch.device(place.device))
    path = RESULTS / f"{slug(device)}.json"
    for name in names:
        progress(name)
        row = run(suite[name], place)
        old = read_json(path)["rows"] if path.exists() else {}
        rows = {key: row if key == name else old[key] for key in suite if key == name or key in old}
        results = {"device": device, "rows": rows}
        with atomic_write(path) as part:
            write_json(part, results)
        with atomic_write(path.with_suffix(".md")) as part:
            part.write_text(table(results) + "\n", encoding="utf-8")
    return path


def run(benchmark: Benchmark, place: Place) -> dict[str, Any]:
    """Measure a row: its description, conditions and figures, or the reason for not running it."""
    conditions = dict(zip(CONDITIONS, (place.threads, torch.__version__, REPEATS), strict=True))
    row = {"what": benchmark.what, "target": benchmark.target, **conditions}
    try:
        figures = [asdict(figure) for figure in benchmark.figures(place)]
    except NotRun as reason:
        return {**row, "met": None, "not_run": str(reason), "figures": []}
    return {
        **row,
        "met": all(figure["met"] for figure in figures if figure["met"] is not None),
        "not_run": None,
        "figures": figures,
    }


def slug(device: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def table(results: dict[str, Any]) -> str:
    """Format the results: the verdict of each row, then each figure with its range and both sides."""
    rows = results["rows"]
    verdicts = [[name, row["what"], row["target"], verdict(row["met"], row["not_run"])] for name, row in rows.items()]
    parts = [f"# {results['device']}", tabulate(verdicts, ["row", "what", "target", "verdict"], tablefmt="github")]
    for (threads, version, repeats), group in groupby(rows.items(), lambda item: itemgetter(*CONDITIONS)(item[1])):
        lines = [line(name, figure) for name, row in group for figure in row["figures"]]
        if lines:
            threaded = f"{threads} {'thread' if threads == 1 else 'threads'}"
            parts.append(f"{threaded}, torch {version}; median of {repeats} repeats in turn (lowest to highest):")
            head = ["row", "case", "figure", "target", "ours", "ms", "peak MB", "other", "ms", "peak MB", "ours per second"]
            parts.append(tabulate(lines, head, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def line(name: str, figure: dict[str, Any]) -> list[str]:
    target = "" if figure["target"] is None else f"{figure['target']:g}: {verdict(figure['met'])}"
    sides = [
        cell
        for side in (figure["ours"], figure["other"])
        for cell in (side["name"], number(1e3 * side["seconds"]), number(side["bytes"] / 1e6))
    ]
    shown = f"{number(figure['value'])} ({number(figure['low'])} to {number(figure['high'])}) {figure['unit']}"
    return [name, figure["case"], shown, target, *sides, figure["rate"] or ""]


def verdict(met: bool | None, not_run: str | None = None) -> str:
    if not_run is not None:
        return f"not run: {not_run}"
    return "met" if met else "not met"


def number(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
