"""The only module that uses private parts of DVC.

tests/pipeline/scheduling/test_dvc_internals.py checks each private part; pyproject.toml bounds the version of DVC.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dvc.dvcfile import PROJECT_FILE
from dvc.exceptions import DvcException, PrettyDvcException
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import _reproduce, get_active_graph, plan_repro
from dvc.stage import PipelineStage, Stage
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from filelock import FileLock, Timeout

LOCK, RWLOCK = Path(".dvc/tmp/pipeline.lock"), Path(".dvc/tmp/rwlock")


class StaleStage(NamedTuple):
    """A stage that `dvc repro` would run."""

    name: str
    command: list[str]
    dependencies: dict[str, Any]
    """Its command and dependencies, as `declared_dependencies` returns them."""


def stale_stages(command: list[str]) -> Iterator[StaleStage]:
    """Find the stages that `dvc repro` would run and whose command starts with `command`, in DVC's order.

    Stages that can be restored from DVC's cache are left out. DVC's lock is held until the iterator ends.
    """
    repo = Repo()
    with repo.lock:
        for stage in repo.index.stages:
            words = shlex.split(stage.cmd) if isinstance(stage.cmd, str) else []
            if words[: len(command)] == command and stage.changed() and not is_restorable(repo, stage):
                yield StaleStage(stage.addressing, words, declared_dependencies(stage))


class OutdatedStage(NamedTuple):
    """A stage that is out of date, or may be once the stages before it have run."""

    name: str
    commands: list[list[str]]
    changes: dict[str, list[str]]
    """Path of each changed dependency -> its changed parameters, if it is a file of parameters."""
    after: dict[str, list[str]]
    """Path of each dependency that other stages will write -> these stages."""
    outputs: list[str]
    """Its outputs that are missing or changed."""


def outdated_stages(planned: Mapping[str, str]) -> Iterator[OutdatedStage]:
    """Find the stages that `dvc repro` would run, in its order, without running or writing anything.

    `planned` has the MD5 of the files that the stage `plan` will write. Stages that DVC's cache can restore are left out.
    """
    repo = Repo()
    writers: dict[str, str] = {}
    restored: set[str] = set()
    with repo.lock:
        graph = get_active_graph(repo.index.graph)
        for stage in plan_repro(graph, named_stages(repo, None)):
            changes: dict[str, list[str]] = {}
            after: dict[str, list[str]] = {}
            for dep in stage.deps:
                path = str(dep)
                if path in planned:
                    if dep.hash_info.value != planned[path]:
                        changes[path] = []
                elif names := [name for out, name in writers.items() if _overlap(out, path)]:
                    after[path] = names
                elif not any(_overlap(out, path) for out in restored):
                    changes |= {path: [*state] if isinstance(state, dict) else [] for path, state in dep.status().items()}
            outputs = [str(out) for out in stage.outs if out.status()]
            if not (changes or after or outputs or stage.changed_stage()):
                continue
            paths = [str(out) for out in stage.outs]
            if not after and _will_be_restored(repo, stage, planned):
                restored |= {*paths}
                continue
            writers |= dict.fromkeys(paths, stage.addressing)
            commands = [shlex.split(text) for text in ([stage.cmd] if isinstance(stage.cmd, str) else stage.cmd or ())]
            yield OutdatedStage(stage.addressing, commands, changes, after, outputs)


def _overlap(first: str, second: str) -> bool:
    """Whether one path is the other or is in it."""
    return f"{first}/".startswith(f"{second}/") or f"{second}/".startswith(f"{first}/")


def _will_be_restored(repo: Repo, stage: PipelineStage, planned: Mapping[str, str]) -> bool:
    """Whether DVC's cache has the outputs of the stage for the files in `planned`."""
    if any(out.persist for out in stage.outs):  # DVC does not cache earlier results of such a stage
        return False
    missing = [dep for dep in stage.deps if str(dep) not in planned and not dep.exists]
    if missing:
        return not stage.changed_stage() and stage.outs_cached() and all(dep.hash_info for dep in stage.deps)
    for dep in stage.deps:
        if str(dep) in planned:
            dep.hash_info, dep.meta = HashInfo("md5", planned[str(dep)]), Meta()
        else:
            dep.save()
    entry = repo.stage_cache._load(stage)
    return entry is not None and repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached()


def reproduce(targets: Any, trained: dict[str, dict[str, Any]] | None = None) -> None:
    """Run `dvc repro` for `targets`, or for all stages if None, and record the stages in `trained` instead of running them.

    `trained` maps a stage to its `declared_dependencies` when training began. A stage is recorded only if they are unchanged. If
    both arguments are given, no stage is run and changed stages are left as they are.

    DVC writes the whole lock file after every stage. Here it is written once, when all stages are done or one has failed. Raises
    ValueError if dvc.yaml has none of the targets.
    """
    trained = trained or {}
    done: list[PipelineStage] = []

    def record(stage: PipelineStage) -> bool:
        unchanged = stage.addressing in trained and declared_dependencies(stage) == trained[stage.addressing]
        if unchanged:
            stage.save()
            stage.commit()
            done.append(stage)
        return unchanged

    def record_or_run(stage: PipelineStage, **options: Any) -> PipelineStage | None:
        if not record(stage):
            if not stage.changed(False, options["upstream"]) or stage.reproduce(**options) is None:
                return None
            done.append(stage)
        return stage

    # Wait for another DVC command instead of losing trained cells.
    repo = Repo(_wait_for_lock=bool(trained))
    with lock_repo(repo), repo.scm_context():
        try:
            # Not passed to DVC as targets: it would read dvc.yaml and dvc.lock again for each of them.
            stages = named_stages(repo, targets)
            if trained and targets:
                for stage in stages:
                    record(stage)
            elif not stages:
                raise ValueError(f"{PROJECT_FILE}: has no stages of a study in this folder")
            else:
                graph = get_active_graph(repo.index.graph)
                _reproduce(plan_repro(graph, stages), graph=graph, repro_fn=record_or_run)
        finally:
            if done:
                done[0].dvcfile.dump_stages(done, update_pipeline=False)


def named_stages(repo: Repo, targets: Iterable[str] | None) -> list[Stage]:
    """Return the stages of dvc.yaml whose name or foreach group is in `targets`; all stages for None."""
    stages = [stage for stage in repo.index.stages if stage.path_in_repo == PROJECT_FILE]
    if targets is None:
        return stages
    names = set(targets)
    return [stage for stage in stages if names & {stage.addressing, stage.addressing.partition("@")[0]}]


def is_restorable(repo: Repo, stage: PipelineStage) -> bool:
    """Return whether DVC's cache has the outputs of the stage in its current state, from any earlier run."""
    if not (stage.changed_stage() or stage.changed_deps()):
        return stage.outs_cached()
    stage.save_deps()
    entry = repo.stage_cache._load(stage)
    return entry is not None and repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached()


def declared_dependencies(stage: PipelineStage) -> dict[str, Any]:
    """Return the command and the current digest or parameter values of each dependency."""
    stage.save_deps()
    return {"cmd": stage.cmd, **{str(dep): dep.hash_info.value for dep in stage.deps}}


def name_user() -> None:
    """Set USER and HOME if the system has none for this user, as in some containers: without them, DVC ends in a traceback.

    The home is a folder of the project, since others may write to a temporary one.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(LOCK.parent.resolve())


@contextmanager
def exclusive_run() -> Iterator[None]:
    """Raise ValueError if another `python -m pipeline run` is running in this folder."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError("another `python -m pipeline run` is running in this folder; wait for it or stop it") from None


def repair_rwlock() -> None:
    """Remove a damaged .dvc/tmp/rwlock: DVC writes it in place, so a kill can leave it unreadable."""
    with suppress(FileNotFoundError):
        try:
            json.loads(RWLOCK.read_text(encoding="utf-8"))
        except ValueError:
            RWLOCK.unlink()


@contextmanager
def readable_dvc_errors() -> Iterator[None]:
    """Turn errors of DVC into a ValueError of one line, and a stage that Ctrl-C ended into KeyboardInterrupt."""
    try:
        yield
    except DvcException as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        if any(str(cause).endswith("exited with 130") for cause in causes):
            raise KeyboardInterrupt from None
        message = "; ".join(" ".join(str(cause).split()) for cause in causes)
        if any(isinstance(cause, PrettyDvcException) and "dvc.lock" in str(cause) for cause in causes):
            message += "; remove dvc.lock and run it again: DVC's cache has the outputs of all finished stages"
        if "not a git repository" in message:  # as in an archive of the sources
            message += ". Fix: run `git init`, or `dvc config core.no_scm true` to work without git"
        raise ValueError(message) from None
