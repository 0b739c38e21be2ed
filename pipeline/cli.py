"""python -m pipeline: the stages of dvc.yaml, and a check of params.yaml. Arguments are parsed here and nothing else is done."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from pipeline.config import claims
from pipeline.config.errors import ParamsError, config_error, find_entry, printable
from pipeline.config.load import load_study
from pipeline.config.study import Study
from pipeline.config.yaml_file import check_rewritten
from pipeline.runtime.determinism import set_deterministic_env


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The stages of the CAT study. `dvc repro` runs them in order; params.yaml says what they do."""


def command(function: Callable[..., None]) -> click.Command:
    """A command whose known faults end in one clear line each and exit code 2."""
    name = function.__name__.replace("_", "-")

    @functools.wraps(function)
    def careful(**arguments: Any) -> None:
        _end_with_dvc()
        try:
            function(**arguments)
        except ParamsError as error:
            for line in error.lines:
                click.echo(line, err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo(f"{name}: interrupted", err=True)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error))):
                raise
            click.echo(f"{name}: out of memory ({printable(' '.join(str(error).split()))})", err=True)
            sys.exit(2)
        except (ValueError, OSError) as error:
            file = getattr(error, "filename", None)
            words = f"{file}: {error.strerror or error}" if isinstance(error, OSError) and file else str(error)
            click.echo(f"{name}: {printable(' '.join(words.split()))}", err=True)
            sys.exit(2)

    return main.command(careful)


def _end_with_dvc() -> None:
    """A stage that outlives a killed DVC would write where the next one writes; elsewhere than on Linux, locks must do."""
    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _pinned() -> Study:
    """The study, of a command that computes: only before torch is imported can it be told what to compute with."""
    study = load_study()
    set_deterministic_env(study.deterministic)
    return study


@command
@click.argument("file", default="params.yaml")
def validate(file: str) -> None:
    """Check a parameter FILE, and claims.yaml; print the grid, and which claims it cannot decide; write nothing."""
    from pipeline.stages.plan import check_stages, of_other_files, table

    study = load_study(file)
    check_rewritten(file)
    check_stages(study, file)
    stated = claims.load()
    claims.check(stated, study)
    click.echo(table(study))
    for line in of_other_files(study):
        click.echo(f"{file}: {line}", err=True)
    for line in claims.undecided(stated, study):
        click.echo(f"{claims.FILE}: {line}", err=True)


@command
def plan() -> None:
    """Check params.yaml before any other stage; write its grid and its JSON schema."""
    from pipeline.stages.plan import check_stages, write

    study = load_study()
    check_stages(study)
    claims.check(claims.load(), study)
    write(study)


@command
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time; as many as there are cores or GPUs by default.")
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help="Train on a Ray cluster: host:port, auto for that of this machine (the default), local for one that ends with the run.",
)
def run(jobs: int | None, ray: str | None) -> None:
    """Reproduce the study as `dvc repro` does, with many cells in training at a time."""
    _pinned()
    from pipeline.scheduling import scheduler

    try:
        scheduler.run(jobs=jobs, ray=ray)
    except scheduler.FailedCellsError as error:
        click.echo(f"failed:\n{error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, ValueError, OSError) as error:
        for failures in getattr(error, "__notes__", ()):
            click.echo(f"failed:\n{failures}", err=True)
        raise


@command
@click.argument("task")
def generate(task: str) -> None:
    """Generate the data of TASK."""
    from pipeline.stages.generate import generate

    study = load_study()
    section = find_entry(study.tasks, "tasks", task)
    generate(task, section.data, study.data_seed)


@command
@click.argument("task")
@click.argument("variant")
def train(task: str, variant: str) -> None:
    """Train VARIANT on TASK, every seed of it."""
    study = _pinned()
    from pipeline.stages.train import CellSetting, train

    section = find_entry(study.tasks, "tasks", task)
    model = find_entry(study.variants, "variants", variant)
    if not any(task in ablation.tasks and variant in ablation.variants for ablation in study.ablations.values()):
        raise config_error("params.yaml", [f"ablations: none trains {variant!r} on {task!r}; name both in one"])
    setting = CellSetting(model, study.optimizer, section.training, study.seeds, study.precision)
    train(task, variant, setting, device=study.device, parallel_runs=study.parallel_runs)


@command
@click.argument("task")
@click.argument("variant")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(min=1), help="Steps to time and to profile.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="That of params.yaml by default.")
def profile(task: str, variant: str, steps: int, device: str | None) -> None:
    """Say where a training step of VARIANT on TASK spends its time; write nothing."""
    study = _pinned()
    from pipeline.commands.profile import profile
    from pipeline.stages.train import CellSetting

    section = find_entry(study.tasks, "tasks", task)
    model = find_entry(study.variants, "variants", variant)
    setting = CellSetting(model, study.optimizer, section.training, study.seeds, study.precision)
    click.echo(profile(task, variant, setting, steps=steps, device=device or study.device))


@command
@click.argument("task")
@click.argument("variant")
@click.option("--prompt", metavar="TEXT", help="What to go on with; what comes in by default.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(min=1), help="Tokens to generate.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0: the most likely token.")
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from so many of the most likely tokens; from all by default.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the draws.")
@click.option("--model-seed", type=int, help="Which of the trained models; the first seed of params.yaml by default.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="That of params.yaml by default.")
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
    """Go on with a text as VARIANT, trained on TASK, would; print what follows, write nothing."""
    study = _pinned()
    from pipeline.commands.sample import SamplingOptions, sample, shown

    find_entry(study.tasks, "tasks", task)
    find_entry(study.variants, "variants", variant)
    read = sys.stdin.buffer.read() if prompt is None else os.fsencode(prompt)
    drawing = SamplingOptions(tokens, temperature, top_k, seed)
    trained = study.seeds[0] if model_seed is None else model_seed
    for text in sample(study, task, variant, read, drawing, model_seed=trained, device=device or study.device):
        click.echo(shown(text) if sys.stdout.isatty() else text, nl=False, color=True)
    click.echo()


@command
@click.argument("task")
def evaluate(task: str) -> None:
    """Score every variant on TASK at every length."""
    study = _pinned()
    from pipeline.config.grid import variants_on
    from pipeline.stages.evaluate import evaluate

    find_entry(study.tasks, "tasks", task)
    evaluate(task, variants_on(study, task), study.seeds, study.precision, device=study.device, parallel_runs=study.parallel_runs)


@command
def judge() -> None:
    """Give every claim of claims.yaml its verdict."""
    from pipeline.stages.judge import judge

    study = load_study()
    judge(study, claims.load())


@command
@click.argument("name")
@click.option("--from", "source", required=True, metavar="VARIANT", help="The variant that it is a copy of.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="What is different; KEY= takes the key out.")
@click.option("--ablation", metavar="NAME", help="Which trains it; the one that trains the other variant by default.")
@click.option("--dry-run", is_flag=True, help="Show what would change in params.yaml; write nothing.")
def add_variant(name: str, source: str, settings: tuple[str, ...], ablation: str | None, dry_run: bool) -> None:
    """Add a variant NAME to params.yaml, a copy of another with some keys changed; say what that will run."""
    from pipeline.commands.add_variant import add_variant

    click.echo(add_variant(name, source, settings, ablation=ablation, dry_run=dry_run))


@command
@click.argument("task", required=False)
def show(task: str | None) -> None:
    """Print the verdicts and the results, of one TASK or of all."""
    from pipeline.commands.show import show

    study = load_study()
    if task is not None:
        find_entry(study.tasks, "tasks", task)
    show(study, task)


@command
@click.argument("revision")
@click.option("--md", is_flag=True, help="As Markdown, for a pull request.")
def diff(revision: str, md: bool) -> None:
    """Say what changed since a REVISION of git, or from an experiment of DVC: parameters, results and verdicts."""
    from pipeline.commands.diff import compare, markdown, show

    sections = compare(revision)
    if md:
        click.echo(markdown(sections))
    else:
        show(sections)


@command
def render() -> None:
    """Draw the figures, write the tables and the metrics."""
    study = _pinned()
    from pipeline.stages.render import render

    render(study)


@command
def report() -> None:
    """Write the report: verdicts, figures, tables, what fails, what was run and when."""
    from pipeline.stages.report import report

    report(load_study())


@command
@click.option("--prune", is_flag=True, help="Delete the runs of older studies, which are kept otherwise.")
def track(prune: bool) -> None:
    """Bring the MLflow store up to date with the files: every run once, none missing."""
    from pipeline.tracking.sync import track

    track(load_study(), prune=prune)


@command
def update_readme() -> None:
    """Copy the study's headline table into README.md."""
    from pipeline.stages.render import update_readme

    update_readme()
