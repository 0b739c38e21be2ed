"""`python -m benchmarks`: measure the named rows, or all rows."""

from __future__ import annotations

import click
from tabulate import tabulate

from benchmarks import suite
from benchmarks.measure import Place
from pipeline.config.errors import ParamsError
from pipeline.runtime.devices import resolve_device
from pipeline.storage.files import read_json


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
@click.option("--list", "listed", is_flag=True, help="List the rows; measure nothing.")
def main(names: tuple[str, ...], device: str, threads: int, listed: bool) -> None:
    """Measure the rows NAMES, or all rows; print the table.

    The results are also in benchmarks/results/<device>.json and .md.
    """
    if listed:
        click.echo(tabulate([[name, row.what, row.target] for name, row in suite.SUITE.items()], ["row", "what", "target"]))
        return
    if unknown := [name for name in names if name not in suite.SUITE]:
        raise click.UsageError(f"no row is called {unknown[0]}. Fix: --list shows the rows")
    try:
        place = Place(resolve_device(device).type, threads)
    except ParamsError:
        raise click.UsageError("this machine has no GPU") from None
    chosen = [name for name in suite.SUITE if not names or name in names]
    path = suite.measure(suite.SUITE, chosen, place, lambda name: click.echo(f"{name} ..", err=True))
    click.echo(suite.table(read_json(path)))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
