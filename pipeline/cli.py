"""The command line, `python -m pipeline`: the stages of dvc.yaml and the tools. Each command makes one library call.

Imports inside the commands keep `validate` and `--help` fast, and let the study's settings reach torch before it is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import click

from pipeline.config import claims
from pipeline.config.errors import ParamsError, find_entry, printable
from pipeline.config.grid import check_cell
from pipeline.config.load import load_study
from pipeline.config.study import Study
from pipeline.config.yaml_file import check_rewritten
from pipeline.runtime.determinism import set_deterministic_env


class SectionedGroup(click.Group):
    """A group whose help lists its commands in sections, in the order of this file."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.sections: dict[str, list[str]] = {"Stages": [], "Tools": []}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(map(len, self.commands))
        for section, names in self.sections.items():
            with formatter.section(section):
                help_texts = {name: self.commands[name].get_short_help_str(formatter.width - 6 - longest) for name in names}
                formatter.write_dl([(name.ljust(longest), text) for name, text in help_texts.items()])


@click.group(cls=SectionedGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run the CAT study. `dvc repro` runs the stages in order; params.yaml declares what they do."""


def command(section: Literal["Stages", "Tools"]) -> Callable[[Callable[..., None]], click.Command]:
    """Add a command to a section; known errors end in one line each and exit code 2."""

    def decorate(function: Callable[..., None]) -> click.Command:
        name = function.__name__.replace("_", "-")

        @functools.wraps(function)
        def guarded(**arguments: Any) -> None:
            _end_with_dvc()
            if (section == "Stages" or name == "run") and hasattr(signal, "SIGPIPE"):
                signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a worker that is killed must not end this process
            try:
                with _timed(name, arguments.get("task")) if section == "Stages" else contextlib.nullcontext():
                    function(**arguments)
            except ParamsError as error:
                for line in error.lines:
                    click.echo(line, err=True)
                sys.exit(2)
            except KeyboardInterrupt:
                click.echo(f"{name}: interrupted", err=True)
                sys.exit(130)
            except BrokenPipeError:  # nobody reads what this command prints
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it flushes at its end
                sys.exit(128 + 13)
            except (MemoryError, RuntimeError) as error:
                if not (isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error))):
                    raise
                click.echo(f"{name}: out of memory ({printable(' '.join(str(error).split()))})", err=True)
                sys.exit(2)
            except (ValueError, OSError) as error:
                file = getattr(error, "filename", None)
                message = f"{file}: {error.strerror or error}" if isinstance(error, OSError) and file else str(error)
                click.echo(f"{name}: {printable(' '.join(message.split()))}", err=True)
                sys.exit(2)

        main.sections[section].append(name)
        return main.command(name)(guarded)

    return decorate


def _timed(stage: str, task: str | None) -> contextlib.AbstractContextManager[None]:
    """Record how long a stage takes, for `run --dry-run`; training has a log per cell."""
    from pipeline.storage.training_log import timed_stage

    return contextlib.nullcontext() if stage == "train" else timed_stage(stage, task)


def _end_with_dvc() -> None:
    """End this process when DVC is killed, or the next stage would write to the same files. Linux only; elsewhere, locks help."""
    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without searching for unused reference cycles, an eighth of the time of importing torch."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def _load_for_torch() -> Study:
    """Load the study and set the environment that torch reads when it is imported; call it before importing torch."""
    study = load_study()
    set_deterministic_env(study.deterministic)
    return study


@command("Stages")
def plan() -> None:
    """Check the study; write plan/ and the JSON schema."""
    from pipeline.stages.plan import check_stages, write

    study = load_study()
    check_stages(study)
    claims.check(claims.load(), study)
    write(study)


@command("Stages")
@click.argument("task")
def generate(task: str) -> None:
    """Generate the data of TASK."""
    from pipeline.stages.generate import generate

    study = load_study()
    section = find_entry(study.tasks, "tasks", task)
    for line in section.data.report():
        click.echo(f"tasks.{task}.data.source = {printable(line)}")
    generate(task, section.data, study.data_seed)


@command("Stages")
@click.argument("task")
@click.argument("variant")
def train(task: str, variant: str) -> None:
    """Train VARIANT on TASK with every seed."""
    study = _load_for_torch()
    with quick_imports():
        from pipeline.stages.live import STAGE_DELAY, LiveFiles
        from pipeline.stages.plan import check_planned
        from pipeline.stages.train import CellSetting, train

    check_cell(study, task, variant)
    if "DVC_STAGE" in os.environ:
        check_planned(study, task, variant)
    setting = CellSetting.of(study, task, variant)
    with LiveFiles(enabled=study.live, delay=STAGE_DELAY) as files:
        train(task, variant, setting, device=study.device, parallel_runs=study.parallel_runs, observe=files.advance)


@command("Stages")
@click.argument("task")
def evaluate(task: str) -> None:
    """Score every variant on TASK at every length."""
    study = _load_for_torch()
    with quick_imports():
        from pipeline.config.grid import variants_on
        from pipeline.config.plots import scored_at_every_rate
        from pipeline.stages.evaluate import evaluate

    find_entry(study.tasks, "tasks", task)
    trained = {variant: study.training[task, variant] for variant in variants_on(study, task)}
    every_rate = scored_at_every_rate(study, task)
    evaluate(task, trained, study.precision, every_rate, device=study.device, parallel_runs=study.parallel_runs)


@command("Stages")
def judge() -> None:
    """Compute the verdict of each claim in claims.yaml."""
    with quick_imports():
        from pipeline.stages.judge import judge

    study = load_study()
    judge(study, claims.load())


@command("Stages")
def render() -> None:
    """Draw the figures; write the tables and the metrics."""
    study = _load_for_torch()
    with quick_imports():
        from pipeline.stages.render import render

    render(study)


@command("Stages")
def report() -> None:
    """Write the report of the whole study."""
    with quick_imports():
        from pipeline.stages.report import report

    report(load_study())


@command("Stages")
@click.option("--prune", is_flag=True, help="Delete the runs of older studies; they stay by default.")
@click.option(
    "--address", metavar="SERVER", help="Print the addresses of the pages on this server; missing results are no error then."
)
def track(prune: bool, address: str | None) -> None:
    """Bring the MLflow store up to date with the files."""
    from pipeline.tracking.sync import addresses, track

    study = load_study()
    try:
        track(study, prune=prune)
    except (ValueError, OSError) as error:
        if not address:
            raise
        click.echo(f"track: {error}", err=True)
    if address:
        for line in addresses(study, address):
            click.echo(line)


@command("Tools")
@click.argument("file", default="params.yaml")
@click.option("--resolved", is_flag=True, help="Print the complete configuration of every variant and cell instead.")
def validate(file: str, resolved: bool) -> None:
    """Check a parameter FILE and claims.yaml; print the grid.

    It also says what `dvc repro` will train, and names the claims that the study cannot decide. It writes nothing.
    """
    from pipeline.stages.changes import PARAMS, retrained_line
    from pipeline.stages.plan import changed_sources, check_stages, note_lines, resolved_text, source_lines, table

    study = load_study(file)
    check_rewritten(file)
    check_stages(study, file)
    all_claims = claims.load()
    claims.check(all_claims, study)
    if resolved:
        click.echo(resolved_text(study))
        return
    click.echo(table(study))
    for line in (*source_lines(study, file), *note_lines(study)):
        click.echo(line)
    if Path(file) == PARAMS:
        click.echo(retrained_line(study))
    for line in changed_sources(study):
        click.echo(f"{file}: {line}", err=True)
    for line in claims.undecided(all_claims, study):
        click.echo(f"{claims.FILE}: {line}", err=True)


@command("Tools")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs that train at once. Default: one per core or GPU.")
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help="Train on a Ray cluster: host:port, auto (the cluster of this machine; the default), or local (started for this run).",
)
@click.option("--only", nargs=2, multiple=True, metavar="TASK VARIANT", help="Train only this cell; can be repeated.")
@click.option("--dry-run", is_flag=True, help="Show which stages are out of date, why, and how long they take.")
def run(jobs: int | None, ray: str | None, only: tuple[tuple[str, str], ...], dry_run: bool) -> None:
    """Run `dvc repro` with many cells in training at once.

    With --only it ends after training. The next `run` or `dvc repro` keeps the cell and does the rest.
    """
    study = _load_for_torch()
    for task, variant in only:
        check_cell(study, task, variant)
    with quick_imports():
        from pipeline.scheduling import dry_run as preview
        from pipeline.scheduling import scheduler

    if dry_run:
        click.echo(preview.dry_run(study, jobs=jobs, only=only))
        return
    try:
        scheduler.run(jobs=jobs, ray=ray, only=only)
    except scheduler.FailedCellsError as error:
        click.echo(f"failed:\n{error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, ValueError, OSError) as error:
        for failures in getattr(error, "__notes__", ()):
            click.echo(f"failed:\n{failures}", err=True)
        raise


@command("Tools")
@click.option("--once", is_flag=True, help="Print the present state and end.")
def watch(once: bool) -> None:
    """Show the runs in training, from their files, until Ctrl-C."""
    from pipeline.commands.watch import watch

    watch(once=once)


@command("Tools")
@click.argument("task", required=False)
@click.argument("variant", required=False)
def register(task: str | None, variant: str | None) -> None:
    """Register the best model of each task in MLflow.

    With TASK, only of this one. With VARIANT, the best seed of this variant.
    """
    study = _load_for_torch()
    from pipeline.tracking.register import register

    if task is not None and variant is not None:
        check_cell(study, task, variant)
    elif task is not None:
        find_entry(study.tasks, "tasks", task)
    for line in register(study, task, variant):
        click.echo(line)


@command("Tools")
@click.argument("task", required=False)
def show(task: str | None) -> None:
    """Print verdicts and results, of one TASK or of all."""
    from pipeline.commands.show import show

    study = load_study()
    if task is not None:
        find_entry(study.tasks, "tasks", task)
    show(study, task)


@command("Tools")
@click.argument("revision")
@click.option("--md", is_flag=True, help="Print Markdown, for a pull request.")
def diff(revision: str, md: bool) -> None:
    """Compare parameters, results and verdicts with a REVISION.

    REVISION is a git revision or the name of a DVC experiment.
    """
    from pipeline.commands.diff import compare, markdown, show

    sections = compare(revision)
    if md:
        click.echo(markdown(sections))
    else:
        show(sections)


@command("Tools")
@click.argument("name")
@click.option("--from", "source", required=True, metavar="VARIANT", help="The variant to copy.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key to change; KEY= removes the key.")
@click.option("--ablation", metavar="NAME", help="The ablation that trains it. Default: the one that trains VARIANT.")
@click.option("--dry-run", is_flag=True, help="Show the change of params.yaml; write nothing.")
def add_variant(name: str, source: str, settings: tuple[str, ...], ablation: str | None, dry_run: bool) -> None:
    """Add variant NAME to params.yaml: a copy with changed keys.

    It prints the stages that `dvc repro` will run for it.
    """
    from pipeline.commands.add_variant import add_variant

    click.echo(add_variant(name, source, settings, ablation=ablation, dry_run=dry_run))


@command("Tools")
@click.argument("file", default="params.yaml", type=click.Path(path_type=Path))
def format(file: Path) -> None:
    """Write a parameter FILE in its usual layout.

    DVC rewrites the whole file for one changed number. This restores the lines and the alignment; comments stay.
    """
    from pipeline.commands.format import format_file

    click.echo(f"{file}: {'formatted' if format_file(file) else 'has this layout already'}")


@command("Tools")
@click.argument("mixer")
def check_mixer(mixer: str) -> None:
    """Check MIXER on the examples in its folder.

    MIXER is the name of a folder in cat/mixers/, or the import path of your own, such as my_package.retention. Exits with 1 if a
    check fails.
    """
    from pipeline.commands.check_mixer import check_mixer, summary

    results = []
    for result in check_mixer(mixer):
        results.append(result)
        click.echo(result.line)
    click.echo(summary(mixer, results))
    if not all(result.passed for result in results):
        sys.exit(1)


@command("Tools")
@click.argument("task")
@click.argument("variant")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(min=1), help="Steps to time and to profile.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: the device of params.yaml.")
def profile(task: str, variant: str, steps: int, device: str | None) -> None:
    """Profile a training step of VARIANT on TASK."""
    study = _load_for_torch()
    from pipeline.commands.profile import profile
    from pipeline.stages.train import CellSetting

    check_cell(study, task, variant)
    click.echo(profile(task, variant, CellSetting.of(study, task, variant), steps=steps, device=device or study.device))


@command("Tools")
@click.argument("task")
@click.argument("variant")
@click.option("--prompt", metavar="TEXT", help="Text to continue. Default: standard input.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(min=1), help="Tokens to generate.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0: the most likely token.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample only from this many most likely tokens. Default: all.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the sampling.")
@click.option("--model-seed", type=int, help="Seed of the trained model. Default: the cell's first seed.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: the device of params.yaml.")
def sample(
    task: str,
    variant: str,
    prompt: str | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    model_seed: int | None,
    device: str | None,
) -> None:
    """Continue a text with VARIANT, trained on TASK."""
    study = _load_for_torch()
    from pipeline.commands.sample import SamplingOptions, escape_for_terminal, sample

    find_entry(study.tasks, "tasks", task)
    find_entry(study.variants, "variants", variant)
    prompt_bytes = sys.stdin.buffer.read() if prompt is None else os.fsencode(prompt)
    options = SamplingOptions(tokens, temperature, top_k, seed)
    for text in sample(study, task, variant, prompt_bytes, options, model_seed=model_seed, device=device or study.device):
        click.echo(escape_for_terminal(text) if sys.stdout.isatty() else text, nl=False, color=True)
    click.echo()


@command("Tools")
@click.argument("task")
@click.argument("variant")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=int, help="Seed of the trained model. Default: the cell's first seed.")
def export(task: str, variant: str, folder: Path, seed: int | None) -> None:
    """Write VARIANT, trained on TASK, to FOLDER for Hugging Face.

    The package transformers and lm-evaluation-harness load it after `import cat.hf`.
    """
    study = _load_for_torch()
    from pipeline.commands.export import export

    check_cell(study, task, variant)
    export(study, task, variant, folder, seed=seed)


@command("Tools")
def update_readme() -> None:
    """Copy the count of verdicts into README.md."""
    from pipeline.stages.render import update_readme

    update_readme()
