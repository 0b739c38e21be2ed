"""Compare parameters, results and verdicts of a git revision or DVC experiment with the working folder."""

from __future__ import annotations

import errno
import math
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML, YAMLError
from tabulate import tabulate

from pipeline.commands.show import COLOURS
from pipeline.config.yaml_file import to_yaml
from pipeline.reporting.verdicts import verdict_table
from pipeline.storage.paths import REPORTS, RESULTS, VERDICTS
from pipeline.storage.tables import CLAIM_COLUMNS, RESULTS_COLUMNS, parse_table, parse_verdicts

PARAMETERS, METRICS, CLAIMS = Path("params.yaml"), REPORTS / "metrics", VERDICTS / "claims.csv"
MIN_DIFFERENCE = 5e-7
"""Half of the last decimal: metrics are written with six."""
MIN_TOLERANCE = 0.001
"""Smaller differences hardly show in tables of three decimals, so they count as reproduced even if no seed differs."""
NAMED = 3
"""At most this many entries are named at the end; all of them are in the table of results."""
_NOTHING = "-"

Cell = tuple[str, str]
"""Variant, task."""
Entry = tuple[str, str, str]
"""Variant, task, name of a metric at a length."""


class Snapshot(NamedTuple):
    """A study at one revision."""

    parameters: dict[str, Any]
    results: dict[Cell, dict[str, float]]
    """Cell -> name of a metric at a length (`accuracy_8x`) -> mean over seeds."""
    verdicts: pd.DataFrame
    spreads: dict[Entry, float]
    """The range over seeds, if there are at least two."""


class Section(NamedTuple):
    """A table of changes, and notes below it. Without columns it is only a line."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def compare(revision: str, *, within_seeds: bool = False) -> list[Section]:
    """List what changed since `revision`, then whether it is reproduced.

    Differences of results that are within the spread of the seeds are only counted, unless `within_seeds` asks for them.
    Raises ValueError if the revision does not exist, or if a file is missing or unreadable on either side.
    """
    before, after = snapshot_at(revision), snapshot_of_folder()
    parameters = list(_parameters(before.parameters, after.parameters))
    sections = [
        Section("parameters", ("key", "before", "after"), parameters, []),
        _results(before, after, within_seeds),
        _verdicts(before.verdicts, after.verdicts),
    ]
    return [
        *(s if s.rows or s.notes else s._replace(notes=["nothing changed"]) for s in sections),
        _reproduced(before, after),
    ]


def show(sections: Iterable[Section], console: Console | None = None) -> None:
    console = console or Console()
    for section in sections:
        if section.rows:
            table = Table(title=section.title, title_justify="left")
            for column in section.columns:
                table.add_column(column, overflow="fold", no_wrap=column == "key")
            for row in section.rows:
                table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
            console.print(table)
        for note in section.notes:
            console.print(Text(f"{section.title}: {note}"), soft_wrap=True)


def markdown(sections: Iterable[Section]) -> str:
    parts = []
    for section in sections:
        if not section.columns:
            parts += [f"{section.title}: {note}" for note in section.notes]
            continue
        parts.append(f"## {section.title}")
        if section.rows:
            rows = [[cell.replace("|", "\\|") for cell in row] for row in section.rows]
            parts.append(tabulate(rows, section.columns, tablefmt="pipe", disable_numparse=True))
        parts += section.notes
    return "\n\n".join(parts)


def snapshot_of_folder() -> Snapshot:
    return _snapshot(Path.read_bytes, sorted(METRICS.glob("*.json")), "")


def snapshot_at(revision: str) -> Snapshot:
    commit = resolve(revision)
    listing = _git("ls-tree", "-z", "--name-only", commit, f"{METRICS.as_posix()}/")
    files = [Path(name) for name in listing.decode().split("\0") if name.endswith(".json")]

    def read(path: Path) -> bytes:
        try:
            return _git("show", f"{commit}:./{path.as_posix()}")
        except ValueError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    return _snapshot(read, files, f"{revision}: ")


def resolve(revision: str) -> str:
    """Find the commit of a git revision or, if there is none, of the DVC experiment with that name.

    Of several experiments with that name, the one that started from HEAD is taken. DVC stores an experiment as
    refs/exps/<2 digits of the commit it started from>/<the other 38>/<its name>.
    """
    try:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    except ValueError:
        refs = _git("for-each-ref", "--format=%(refname)", "refs/exps").decode().split()
    named = [ref for ref in refs if ref.count("/") == 4 and ref.rpartition("/")[2] == revision]
    if len(named) > 1:
        head = resolve("HEAD")
        named = [ref for ref in named if ref.split("/")[2:4] == [head[:2], head[2:]]] or named
    if len(named) > 1:
        raise ValueError(f"{revision!r} is the name of {len(named)} experiments. Fix: give one of {', '.join(named)}")
    if not named:
        raise ValueError(f"{revision!r} is neither a git revision nor a DVC experiment")
    return resolve(named[0])


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").removeprefix("fatal: ").partition("\n")[0])
    return done.stdout


def _snapshot(read: Callable[[Path], bytes], metrics: list[Path], prefix: str) -> Snapshot:
    """Raises ValueError if a file is missing or unreadable; `prefix` precedes its name in the message."""

    def content(path: Path, parse: Callable[[bytes], Any], *, optional: bool = False) -> Any:
        try:
            return parse(read(path))
        except OSError as error:
            if optional and isinstance(error, FileNotFoundError):
                return {}
            raise ValueError(f"{prefix}{path}: {error.strerror}") from None
        except (ValueError, KeyError, YAMLError) as error:
            raise ValueError(f"{prefix}{path}: cannot be read: {' '.join(str(error).split())}") from None

    parameters, verdicts = content(PARAMETERS, _parse_parameters), content(CLAIMS, _parse_verdicts)
    if not metrics:
        raise ValueError(f"{prefix}{METRICS}: has no metrics. Fix: run `dvc repro`")
    results = {(path.stem, task): values for path in metrics for task, values in content(path, _parse_metrics).items()}
    spreads: dict[Entry, float] = {}
    for task in dict.fromkeys(task for _, task in results):
        spreads |= content(RESULTS / f"{task}.csv", partial(_spreads, parameters, task), optional=True)
    return Snapshot(parameters, results, verdicts, spreads)


def _parse_parameters(text: bytes) -> dict[str, Any]:
    parameters = YAML(typ="safe").load(text.decode())
    if not isinstance(parameters, dict):
        raise ValueError("it is not a mapping")
    return parameters


def _parse_metrics(text: bytes) -> dict[str, dict[str, float]]:
    try:
        return TypeAdapter(dict[str, dict[str, float]]).validate_json(text)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None


def _parse_verdicts(text: bytes) -> pd.DataFrame:
    """One row per claim, indexed by the claim's name."""
    if not text.strip():
        return pd.DataFrame(columns=[*CLAIM_COLUMNS]).set_index("claim")
    return parse_verdicts(text.decode()).set_index("claim")


def _parameters(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, ...]]:
    """Yield the dotted keys whose values differ; a mapping that is new or gone counts as one value."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _parameters(before.get(key, _MISSING), after.get(key, _MISSING), f"{path}.{key}" if path else f"{key}")
    elif before != after:
        yield path, *(_NOTHING if value is _MISSING else to_yaml(value) for value in (before, after))


_MISSING = object()


def _results(before: Snapshot, after: Snapshot, within_seeds: bool) -> Section:
    """List the metrics of the cells on both sides, largest difference first; other cells become notes."""
    rows: list[tuple[str, ...]] = []
    hidden = 0
    for entry, difference in _differences(before, after):
        if abs(difference) <= MIN_DIFFERENCE:
            continue
        spread = _spread(before, after, entry)
        within = spread is not None and abs(difference) <= max(spread, MIN_TOLERANCE)
        if within and not within_seeds:
            hidden += 1
            continue
        (variant, task, metric), seeds = entry, _NOTHING if spread is None else f"{spread:.6f}"
        means = (f"{side.results[variant, task][metric]:.6f}" for side in (before, after))
        rows.append((variant, task, *_metric_and_length(metric), *means, f"{difference:+.6f}", seeds))
    sides = before.results, after.results
    notes = [f"{word}: {text}" for word, old, new in (("new", *sides), ("gone", *sides[::-1])) for text in _added(old, new)]
    if hidden:
        notes.append(f"{hidden} {'difference' if hidden == 1 else 'differences'} within the spread of seeds; --all shows them")
    columns = ("variant", "task", "metric", "length", "before", "after", "difference", "range over seeds")
    return Section("results", columns, rows, notes)


def _differences(before: Snapshot, after: Snapshot) -> list[tuple[Entry, float]]:
    """The difference of each mean that both sides have, largest first."""
    differences = [
        ((*cell, metric), after.results[cell][metric] - mean)
        for cell, means in before.results.items()
        for metric, mean in means.items()
        if metric in after.results.get(cell, {})
    ]
    return sorted(differences, key=lambda item: -abs(item[1]))


def _spread(before: Snapshot, after: Snapshot, entry: Entry) -> float | None:
    """The range of an entry over seeds, the larger of the two sides, or None if neither has several seeds."""
    return max((side.spreads[entry] for side in (before, after) if entry in side.spreads), default=None)


def _added(old: dict[Cell, dict[str, float]], new: dict[Cell, dict[str, float]]) -> Iterator[str]:
    """Describe the cells, and the metrics of common cells, that only `new` has."""
    tasks: dict[str, list[str]] = defaultdict(list)
    cells: dict[str, int] = defaultdict(int)
    for cell, values in new.items():
        if cell not in old:
            tasks[cell[0]].append(cell[1])
        else:
            for metric in values.keys() - old[cell].keys():
                cells[metric] += 1
    yield from (f"{variant} on {', '.join(names)}" for variant, names in tasks.items())
    yield from (f"{' at '.join(_metric_and_length(name))} of {count} cells" for name, count in sorted(cells.items()))


def _metric_and_length(name: str) -> tuple[str, str]:
    metric, _, length = name.rpartition("_")
    return metric.replace("_", " "), length


def _verdicts(before: pd.DataFrame, after: pd.DataFrame) -> Section:
    """List the claims whose verdict changed, is new, or is gone."""
    sides = [
        dict(zip(table.index, zip(shown["claim"], table["verdict"], shown["effect (95 % interval)"], strict=True), strict=True))
        for table in (before, after)
        for shown in [verdict_table(table)]
    ]
    rows = []
    for claim in {**sides[0], **sides[1]}:
        old, new = (side.get(claim, ("", _NOTHING, _NOTHING)) for side in sides)
        if old[1] != new[1]:
            rows.append((new[0] or old[0], *old[1:], *new[1:]))
    return Section("verdicts", ("claim", "before", "effect (95 % interval)", "after", "effect (95 % interval)"), rows, [])


def _reproduced(before: Snapshot, after: Snapshot) -> Section:
    """Summarise in one line: are verdicts the same, and means equal up to the spread over seeds?"""
    old, new = before.verdicts["verdict"].to_dict(), after.verdicts["verdict"].to_dict()
    claims = {**old, **new}
    faults = [
        f"{claim}: {old.get(claim, 'no verdict')} -> {new.get(claim, 'no verdict')}"
        for claim in claims
        if old.get(claim) != new.get(claim)
    ]
    equal = f"{len(claims) - len(faults)} of {len(claims)} verdicts"
    entries = [{(*cell, name) for cell, means in side.results.items() for name in means} for side in (before, after)]
    if unmatched := len(entries[0] ^ entries[1]):
        faults.append(f"{unmatched} {'entry' if unmatched == 1 else 'entries'} on one side only")
    differences = [(entry, abs(difference)) for entry, difference in _differences(before, after)]
    beyond, known = [], True
    for entry, difference in differences:
        spread = _spread(before, after, entry)
        if spread is None:
            known &= difference <= MIN_DIFFERENCE
        elif difference > max(spread, MIN_TOLERANCE):
            beyond.append(f"{_entry(*entry)} differs by {_short(difference)}, its seeds by {_short(spread)}")
    faults += beyond[:NAMED]
    if len(beyond) > NAMED:
        faults.append(f"{len(beyond) - NAMED} more entries differ by more than their seeds")
    largest = f"largest difference {_short(max((difference for _, difference in differences), default=0.0))}"
    if faults:
        return Section("not reproduced", (), [], [f"{equal}, {largest}; {'; '.join(faults)}"])
    return Section("reproduced", (), [], [f"{equal}, {largest} ({'within seed spread' if known else 'seed spread unknown'})"])


def _entry(variant: str, task: str, metric: str) -> str:
    return f"{' at '.join(_metric_and_length(metric))} of {variant} on {task}"


def _short(value: float) -> str:
    """Three decimals, or six if three would be zeros, without the zero before the point."""
    if value <= MIN_DIFFERENCE:
        return "0"
    return f"{value:.{3 if value >= 0.0005 else 6}f}".removeprefix("0")


def _spreads(parameters: dict[str, Any], task: str, text: bytes) -> dict[Entry, float]:
    """Compute the range over seeds of every metric of `task` at every length, if there are at least two seeds."""
    table = parse_table(text.decode(), RESULTS_COLUMNS)
    try:
        data = parameters["tasks"][task]["data"]
        multiples = {round(multiple * data["length"]): f"{multiple:g}x" for multiple in data["multiples"]}
    except (KeyError, TypeError, ValueError):
        return {}
    values = table.groupby(["variant", "metric", "length"])["value"].agg(["min", "max", "count"])
    return {
        (variant, task, f"{metric}_{multiples[length]}"): high - low
        for (variant, metric, length), low, high, count in values.itertuples()
        if length in multiples and count > 1 and math.isfinite(high - low)
    }
