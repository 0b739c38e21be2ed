"""The only module that uses DVC's private parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from dvc.dependency import param
from dvc.dvcfile import PROJECT_FILE
from dvc.exceptions import DvcException, PrettyDvcException
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import _reproduce, get_active_graph, plan_repro
from dvc.stage import PipelineStage, Stage
from filelock import FileLock, Timeout

LOCK, RWLOCK = Path(".dvc/tmp/pipeline.lock"), Path(".dvc/tmp/rwlock")


def reproduce(targets: Any, trained: dict[str, dict[str, Any]] | None = None) -> None:
    """`dvc repro` of `targets`, of everything for None, but for the stages `trained`: recorded if what they declare is as given.

    Where both are given nothing is run: what is not as given is left as it is. DVC writes the whole lock file after every stage;
    here it is written once, when all are done or one has failed. Raises ValueError where dvc.yaml has none of them.
    """
    trained = trained or {}
    done: list[PipelineStage] = []

    def record(stage: PipelineStage) -> bool:
        given = stage.addressing in trained and declared_dependencies(stage) == trained[stage.addressing]
        if given:
            stage.save()
            stage.commit()
            done.append(stage)
        return given

    def record_or_run(stage: PipelineStage, **options: Any) -> PipelineStage | None:
        if not record(stage):
            if not stage.changed(False, options["upstream"]) or stage.reproduce(**options) is None:
                return None
            done.append(stage)
        return stage

    # What has been trained is worth waiting for another command of DVC's.
    repo = Repo(_wait_for_lock=bool(trained))
    with parse_params_once(), lock_repo(repo), repo.scm_context():
        try:
            # Not as targets of DVC, which reads dvc.yaml and dvc.lock anew for each.
            stages = named_stages(repo, targets)
            if trained and targets:
                for stage in stages:
                    record(stage)
            elif not stages:
                raise ValueError(f"{PROJECT_FILE} has no stages of a study in this folder")
            else:
                graph = get_active_graph(repo.index.graph)
                _reproduce(plan_repro(graph, stages), graph=graph, repro_fn=record_or_run)
        finally:
            if done:
                done[0].dvcfile.dump_stages(done, update_pipeline=False)


def named_stages(repo: Repo, targets: Iterable[str] | None) -> list[Stage]:
    """The stages of dvc.yaml that are named, or of which the group is; all for None."""
    ours = [stage for stage in repo.index.stages if stage.path_in_repo == PROJECT_FILE]
    if targets is None:
        return ours
    wanted = set(targets)
    return [stage for stage in ours if wanted & {stage.addressing, stage.addressing.partition("@")[0]}]


def is_restorable(repo: Repo, stage: PipelineStage) -> bool:
    """Whether DVC has the outcome of the stage as it is now, from this or from an earlier run of it."""
    if not (stage.changed_stage() or stage.changed_deps()):
        return stage.outs_cached()
    stage.save_deps()
    entry = repo.stage_cache._load(stage)
    return entry is not None and repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached()


def declared_dependencies(stage: PipelineStage) -> dict[str, Any]:
    """The command, and the digest or the values of every dependency as it is now."""
    stage.save_deps()
    return {"cmd": stage.cmd, **{str(dep): dep.hash_info.value for dep in stage.deps}}


@contextmanager
def parse_params_once() -> Iterator[None]:
    """DVC parses params.yaml for every stage, and goes through all of it for every key: the square of the number of cells.

    Here it is parsed anew only when it has changed, and a key is looked up.
    """
    read_param_file = param.read_param_file
    parsed: dict[tuple[Any, ...], Any] = {}

    def look_up(fs: Any, path: str, keys: list[str] | None = None, flatten: bool = False, **options: Any) -> Any:
        if not (keys and flatten):
            return read_param_file(fs, path, keys, flatten, **options)
        about = Path(path).stat()
        state = (path, about.st_mtime_ns, about.st_size, about.st_ino)
        if state not in parsed:
            parsed.clear()
            parsed[state] = read_param_file(fs, path, **options)
        values = {}
        for key in keys:
            # What is not there is left out, as DVC does.
            with suppress(KeyError, TypeError):
                # A copy: what two stages share would be written as an alias into the lock.
                values[key] = deepcopy(reduce(getitem, key.split("."), parsed[state]))
        return values

    param.read_param_file = look_up
    try:
        yield
    finally:
        param.read_param_file = read_param_file


@contextmanager
def exclusive_run() -> Iterator[None]:
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError("another `python -m pipeline run` is at work in this folder; wait for it, or end it") from None


def repair_rwlock() -> None:
    """DVC writes in place what it is reading and writing: killed in that moment, it leaves what no later one can read."""
    with suppress(FileNotFoundError):
        try:
            json.loads(RWLOCK.read_text(encoding="utf-8"))
        except ValueError:
            RWLOCK.unlink()


@contextmanager
def readable_dvc_errors() -> Iterator[None]:
    try:
        yield
    except DvcException as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        if any(str(cause).endswith("exited with 130") for cause in causes):
            raise KeyboardInterrupt from None
        words = "; ".join(" ".join(str(cause).split()) for cause in causes)
        if any(isinstance(cause, PrettyDvcException) and "dvc.lock" in str(cause) for cause in causes):
            words += "; remove dvc.lock and run it again: what has been run is in DVC's cache"
        raise ValueError(words) from None
