"""Which stages `run` would run, why, and how long they took before. It runs and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from tabulate import tabulate

from pipeline.config.grid import cells
from pipeline.config.study import Study
from pipeline.runtime.devices import resolve_devices
from pipeline.scheduling.dvc_internals import OutdatedStage, name_user, outdated_stages, readable_dvc_errors
from pipeline.scheduling.scheduler import assign
from pipeline.stages.changes import NEW, Plan, clock, plan_of, train_stage
from pipeline.storage.training_log import stage_seconds, training_seconds

NAMED = 3
"""At most this many stages are named as the reason of another."""


def dry_run(study: Study, *, jobs: int | None = None, only: Collection[tuple[str, str]] = ()) -> str:
    """Describe the stages that are out of date, as text; with `only`, the stages of these cells."""
    plan = plan_of(study)
    with readable_dvc_errors():
        name_user()
        outdated = list(outdated_stages(plan.digests))
    if only:
        chosen = {train_stage(cell) for cell in cells(study) if cell[:2] in only}
        chosen |= {"plan", *(f"generate@{task}" for task, _ in only)}
        outdated = [stage for stage in outdated if stage.name in chosen]
    if not outdated:
        return "nothing is out of date"
    rows = [(stage.name, "; ".join(_reasons(stage, plan)), _text(_seconds(stage))) for stage in outdated]
    table = tabulate(rows, ["stage", "because of", "h:mm:ss"], maxcolwidths=[None, 90, None], disable_numparse=True)
    processes = len(assign(resolve_devices(study.device), jobs))
    return "\n\n".join([table, *_totals(outdated, plan, processes)])


def _reasons(stage: OutdatedStage, plan: Plan) -> Iterator[str]:
    if any(plan.reasons.get(path) == [NEW] for path in stage.changes):
        yield NEW
        return
    for path, parameters in stage.changes.items():
        yield from plan.reasons.get(path, parameters or [path])
    if writers := list(dict.fromkeys(name for names in stage.after.values() for name in names)):
        more = f" and {len(writers) - NAMED} more" if len(writers) > NAMED else ""
        yield f"after {', '.join(writers[:NAMED])}{more}"
    if not stage.changes and not stage.after:
        yield from [f"{path} is missing or was changed" for path in stage.outputs] or ["its command in dvc.yaml"]


def _is_training(stage: OutdatedStage) -> bool:
    return stage.name.startswith("train_")


def _seconds(stage: OutdatedStage) -> float | None:
    """The seconds that the commands of the stage took last time; None if one is not known."""
    times = [
        training_seconds(*words[4:6]) if _is_training(stage) else stage_seconds(words[3], *words[4:5]) for words in stage.commands
    ]
    return None if None in times else math.fsum(filter(None, times))


def _text(seconds: float | None) -> str:
    return "not known" if seconds is None else clock(seconds)


def _totals(outdated: list[OutdatedStage], plan: Plan, processes: int) -> Iterator[str]:
    """Yield one paragraph about the stages that will run, and one about cells whose data may stay the same."""
    perhaps = [stage for stage in outdated if _is_training(stage) and not stage.changes and not stage.outputs]
    training = [stage for stage in outdated if _is_training(stage) and stage not in perhaps]
    others = [stage for stage in outdated if not _is_training(stage)]
    for chosen, condition in ((training, ""), (perhaps, ", if the new data differ")):
        if chosen:
            yield f"cells to train{condition}: {len(chosen)}, {_sum(chosen, processes)} with {processes} runs at a time"
    if others:
        yield f"other stages: {len(others)}, {_sum(others, 1)}"


def _sum(stages: list[OutdatedStage], processes: int) -> str:
    """The measured time of the stages."""
    times = [_seconds(stage) for stage in stages]
    known = [seconds for seconds in times if seconds is not None]
    if not known:
        return "how long is not known"
    unknown = f" and {len(times) - len(known)} whose time is not known" if len(known) < len(times) else ""
    return f"about {clock(math.fsum(known) / processes)}{unknown}"
