"""What changed between a revision of git, or an experiment of DVC, and the working folder: parameters, results, verdicts."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
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
from pipeline.storage.paths import REPORTS, VERDICTS
from pipeline.storage.tables import CLAIM_COLUMNS, parse_table

PARAMETERS, METRICS, CLAIMS = Path("params.yaml"), REPORTS / "metrics", VERDICTS / "claims.csv"
SMALLEST = 5e-7
"""Metrics are written with six decimals."""
_NOTHING = "-"

Cell = tuple[str, str]
"""Variant and task."""


class Snapshot(NamedTuple):
    """A study at one time."""

    parameters: dict[str, Any]
    results: dict[Cell, dict[str, float]]
    """Of each cell the mean of every metric at a length, by its name."""
    verdicts: pd.DataFrame


class Section(NamedTuple):
    """A table of what changed, empty where nothing did, and what else there is to say."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def compare(revision: str) -> list[Section]:
    """What changed since. Raises ValueError where there is no such revision or a file is missing or unreadable, there or here."""
    before, after = there(revision), here()
    parameters = list(_parameters(before.parameters, after.parameters))
    sections = [
        Section("parameters", ("key", "before", "after"), parameters, []),
        _results(before.results, after.results),
        _verdicts(before.verdicts, after.verdicts),
    ]
    return [s if s.rows or s.notes else s._replace(notes=["nothing changed"]) for s in sections]


def show(sections: Iterable[Section], console: Console | None = None) -> None:
    """Prints a table a section."""
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
            console.print(Text(f"{section.title}: {note}"))


def markdown(sections: Iterable[Section]) -> str:
    """The same for a pull request."""
    parts = []
    for section in sections:
        parts.append(f"## {section.title}")
        if section.rows:
            rows = [[cell.replace("|", "\\|") for cell in row] for row in section.rows]
            parts.append(tabulate(rows, section.columns, tablefmt="pipe", disable_numparse=True))
        parts += section.notes
    return "\n\n".join(parts)


def here() -> Snapshot:
    """The study of the working folder."""
    return _snapshot(Path.read_bytes, sorted(METRICS.glob("*.json")), "")


def there(revision: str) -> Snapshot:
    """The study at a revision."""
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
    """The commit of a revision of git or, where there is none, of the experiment of that name: of HEAD if several have it.

    DVC keeps an experiment as refs/exps/<2 digits of the commit that it began from>/<the other 38>/<its name>.
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
        raise ValueError(f"{revision!r} is the name of {len(named)} experiments; say which: {', '.join(named)}")
    if not named:
        raise ValueError(f"{revision!r} is neither a revision of git nor an experiment of DVC")
    return resolve(named[0])


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").removeprefix("fatal: ").partition("\n")[0])
    return done.stdout


def _snapshot(read: Callable[[Path], bytes], metrics: list[Path], where: str) -> Snapshot:
    """Raises ValueError where a file is missing or unreadable; `where` is what its name begins with."""

    def content(path: Path, parse: Callable[[bytes], Any]) -> Any:
        try:
            return parse(read(path))
        except OSError as error:
            raise ValueError(f"{where}{path}: {error.strerror}") from None
        except (ValueError, KeyError, YAMLError) as error:
            raise ValueError(f"{where}{path}: cannot be read: {' '.join(str(error).split())}") from None

    parameters, verdicts = content(PARAMETERS, _parse_parameters), content(CLAIMS, _parse_verdicts)
    if not metrics:
        raise ValueError(f"{where}{METRICS}: has no metrics; `dvc repro` writes them")
    results = {(path.stem, task): values for path in metrics for task, values in content(path, _parse_metrics).items()}
    return Snapshot(parameters, results, verdicts)


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
    """A row a claim, by its name."""
    if not text.strip():
        return pd.DataFrame(columns=[*CLAIM_COLUMNS]).set_index("claim")
    return parse_table(text.decode(), CLAIM_COLUMNS).set_index("claim")


def _parameters(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, ...]]:
    """Dotted keys whose values differ; a mapping that is new or gone as a whole is one of them."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _parameters(before.get(key, _MISSING), after.get(key, _MISSING), f"{path}.{key}" if path else f"{key}")
    elif before != after:
        yield path, *(_NOTHING if value is _MISSING else to_yaml(value) for value in (before, after))


_MISSING = object()


def _results(before: dict[Cell, dict[str, float]], after: dict[Cell, dict[str, float]]) -> Section:
    """Metrics of the cells that are on both sides, the largest difference first; the others as notes."""
    both = [(*cell, metric, before[cell], after[cell]) for cell in before if cell in after for metric in before[cell]]
    changed = [(v, t, m, old[m], new[m]) for v, t, m, old, new in both if m in new and abs(new[m] - old[m]) > SMALLEST]
    rows: list[tuple[str, ...]] = [
        (variant, task, *_metric_and_length(metric), f"{old:.6f}", f"{new:.6f}", f"{new - old:+.6f}")
        for variant, task, metric, old, new in sorted(changed, key=lambda row: -abs(row[4] - row[3]))
    ]
    notes = [
        f"{word}: {text}" for word, old, new in (("new", before, after), ("gone", after, before)) for text in _only(old, new)
    ]
    columns = ("variant", "task", "metric", "length", "before", "after", "difference")
    return Section("results", columns, rows, notes)


def _only(old: dict[Cell, dict[str, float]], new: dict[Cell, dict[str, float]]) -> Iterator[str]:
    """What is in `new` alone: cells by their variant, and metrics of cells that both have."""
    tasks: dict[str, list[str]] = defaultdict(list)
    cells: dict[str, int] = defaultdict(int)
    for cell, values in new.items():
        if cell not in old:
            tasks[cell[0]].append(cell[1])
        else:
            for metric in values.keys() - old[cell].keys():
                cells[metric] += 1
    yield from (f"{variant} on {', '.join(where)}" for variant, where in tasks.items())
    yield from (f"{' at '.join(_metric_and_length(name))} of {count} cells" for name, count in sorted(cells.items()))


def _metric_and_length(name: str) -> tuple[str, str]:
    metric, _, length = name.rpartition("_")
    return metric.replace("_", " "), length


def _verdicts(before: pd.DataFrame, after: pd.DataFrame) -> Section:
    """Claims with another verdict, new or gone."""
    said = [
        dict(zip(table.index, zip(shown["claim"], table["verdict"], shown["effect (95 % interval)"], strict=True), strict=True))
        for table in (before, after)
        for shown in [verdict_table(table)]
    ]
    rows = []
    for claim in {**said[0], **said[1]}:
        old, new = (side.get(claim, ("", _NOTHING, _NOTHING)) for side in said)
        if old[1] != new[1]:
            rows.append((new[0] or old[0], *old[1:], *new[1:]))
    return Section("verdicts", ("claim", "before", "effect (95 % interval)", "after", "effect (95 % interval)"), rows, [])
