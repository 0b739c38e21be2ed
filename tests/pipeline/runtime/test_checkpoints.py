"""Nothing that is done is lost: killed, interrupted, out of memory or of disk; what goes on ends as if nothing had happened."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dvc.exceptions import ReproductionError
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from filelock import FileLock

import cat.training.fit
from cat.config import OptimizerConfig, TrainingConfig
from cat.evaluation.scores import Split, sequence_totals
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.performer.config import PerformerConfig
from cat.training.ensemble import Ensemble, fit_ensemble
from cat.training.fit import backward, build_model, fit
from pipeline.cli import _end_with_dvc
from pipeline.config.load import load_study
from pipeline.runtime import checkpoints, workers
from pipeline.runtime.checkpoints import Checkpoint
from pipeline.runtime.determinism import MARK
from pipeline.scheduling import scheduler
from pipeline.scheduling.dvc_internals import RWLOCK, readable_dvc_errors
from pipeline.stages import train as training
from pipeline.storage import runs
from pipeline.storage.files import atomic_write, read_json
from pipeline.storage.task_data import read_meta, read_split, read_task
from tests.helpers.study import ROOT, edit, read_params, stage, tiny_study, write_params

CPU = torch.device("cpu")
VOCABULARY, LENGTH = 11, 7
PROTOCOL = OptimizerConfig(
    weight_decay=0.1, grad_clip=1.0, warmup=0.1, eval_every=5, early_stop_accuracy=0.9, early_stop_patience=2
)
MODELS = {
    "filters": AttentionConfig(mixer="attention", width=12, layers=2, heads=2, position="none", conv_q=3, conv_k=3, tied=True),
    "mamba": MambaConfig(mixer="mamba", width=12, layers=1),
    "features": PerformerConfig(mixer="performer", width=12, layers=1, heads=2, position="none", features=4),
}


def successor(count, seed):
    """At every other token, the next number; of some examples, one question less is asked."""
    inputs = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    targets = torch.full_like(inputs, -100)
    targets[:, 2::2] = (inputs[:, 2::2] + 1) % VOCABULARY
    targets[::3, 2] = -100
    return Split.of(inputs, targets)


def build(name="filters", seed=3):
    return build_model(MODELS[name], vocabulary=VOCABULARY, length=LENGTH, seed=seed)


def run(name="filters", *, steps=23, rate=0.03, **options):
    """A run of epochs of three steps and a look every five."""
    schedule = TrainingConfig(steps=steps, batch=16, learning_rates=[rate])
    options = {"protocol": PROTOCOL, "seed": 2, "stop_early": True, **options}
    return fit(build(name), successor(50, 0), successor(17, 1), training_config=schedule, learning_rate=rate, **options)


def kept_by(train):
    """What `train` returns, and the state after every step of it."""
    states = []
    return train(checkpoint=lambda state, ended: states.append((state(), ended))), states


def assert_same(first, second):
    assert (first.history, first.steps, first.stop) == (second.history, second.steps, second.stop)
    weights = second.model.state_dict()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight.nan_to_num(7), weights[name].nan_to_num(7)), name


@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_to_the_same_bits_from_wherever_it_stood(name):
    whole_run, states = kept_by(lambda **options: run(name, stop_early=False, **options))
    assert whole_run.stop == "steps"
    assert [ended for _, ended in states] == [False] * 22 + [True]
    for state, _ in [states[0], states[4], states[7], states[15], states[-1]]:
        assert_same(run(name, stop_early=False, resume=state), whole_run)
    assert_same(whole_run, run(name, stop_early=False))


def test_a_run_that_has_stopped_early_is_not_gone_on_with(monkeypatch):
    stopped, states = kept_by(lambda **options: run(steps=400, **options))
    assert stopped.stop == "accuracy"
    for state, _ in states[-2:]:
        assert_same(run(steps=400, resume=state), stopped)
    monkeypatch.setattr(cat.training.fit, "backward", None)
    assert_same(run(steps=400, resume=states[-1][0]), stopped)


@pytest.mark.parametrize("stood", [3, 5, 6, -1])
def test_a_run_that_goes_on_diverges_where_it_would_have(monkeypatch, stood):
    rate = cat.training.fit.lr_scale
    monkeypatch.setattr(cat.training.fit, "rate", lambda step, *about: math.nan if step == 6 else rate(step, *about))
    diverged, states = kept_by(run)
    assert (diverged.stop, diverged.steps) == ("diverged", 7)
    assert_same(run(resume=states[stood - 1 if stood > 0 else -1][0]), diverged)


def together(name="filters", **options):
    schedule = TrainingConfig(steps=13, batch=16, learning_rates=[0.1])
    models = [build(name, seed=seed) for seed in (0, 1, 2)]
    options = {"protocol": PROTOCOL, "schedule": schedule, "learning_rates": (0.01, 0.2, 0.03), **options}
    return fit_ensemble(models, successor(50, 0), successor(17, 1), seeds=(4, 5, 6), stop_early=False, **options)


@pytest.mark.parametrize("step", [3, 5])
def test_replicas_go_on_from_where_they_stood(step):
    expected, states = kept_by(together)
    assert [ended for _, ended in states] == [False] * 12 + [True]
    stood = states[step - 1][0]
    assert list(stood) == [0, 1, 2]
    for mine, theirs in zip(together(resume=list(stood.values())), expected, strict=True):
        assert_same(mine, theirs)
    # And one of them alone, which is another way to add up.
    schedule = TrainingConfig(steps=13, batch=16, learning_rates=[0.1])
    options = {"protocol": PROTOCOL, "schedule": schedule, "learning_rate": 0.2, "stop_early": False}
    alone = fit(build(seed=1), successor(50, 0), successor(17, 1), seed=5, resume=stood[1], **options)
    assert [row.step for row in alone.history] == [5, 10, 13]
    assert alone.history[-1].valid_loss == pytest.approx(expected[1].history[-1].valid_loss, rel=1e-3)


# Memory.


def no_room_for_more_than(monkeypatch, size):
    answers = cat.model.SequenceModel.answers

    def limited(self, tokens, at):
        if len(tokens) > size and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return answers(self, tokens, at)

    monkeypatch.setattr(cat.model.SequenceModel, "answers", limited)


def test_runs_go_on_together_where_they_stand_at_the_same_step(monkeypatch):
    """But one that has ended, or takes its batches in parts, of which replicas know nothing, goes on by itself."""
    jobs = [training.Job(0.1, seed) for seed in range(7)]
    stood = {1: (5, None, None), 2: (5, None, None), 3: (5, 8, None), 4: (5, 8, None), 5: (5, None, "accuracy")}

    def checkpoint(cell, job, where):
        step, micro_batch, stop = stood.get(job.seed, (None, None, None))
        kept = checkpoints.Kept(SimpleNamespace(step=step, micro_batch=micro_batch, stop=stop), 1.0) if step else None
        return SimpleNamespace(read=lambda: kept)

    monkeypatch.setattr(training, "_checkpoint", checkpoint)
    groups = [[job.seed for job in alike] for alike in training._standing(None, tuple(jobs), "here")]
    assert groups == [[0, 6], [1, 2], [3], [4], [5]]


def test_a_batch_without_room_is_taken_in_slices_and_the_step_is_the_same(monkeypatch):
    batch = successor(17, 0).rows(slice(None))
    whole_model, sliced = build(), build()
    loss, micro_batch = backward(whole_model, batch)
    assert micro_batch is None
    no_room_for_more_than(monkeypatch, 6)
    sliced_loss, micro_batch = backward(sliced, batch)
    assert micro_batch == 5  # 17, 9, 5
    torch.testing.assert_close(sliced_loss, loss)
    for mine, theirs in zip(sliced.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    no_room_for_more_than(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        backward(build(), batch)


def test_nothing_is_left_of_the_slices_before_one_without_room(monkeypatch):
    batch, expected, sliced = successor(16, 0).rows(slice(None)), build(), build()
    backward(expected, batch)
    share, calls = cat.training.fit.mean_loss, []

    def full_at_the_second(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return share(*arguments, **options)

    monkeypatch.setattr(cat.training.fit, "mean_loss", full_at_the_second)
    assert backward(sliced, batch, micro_batch=8)[1] == 4
    for mine, theirs in zip(sliced.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_run_goes_on_with_the_slices_that_had_room(monkeypatch):
    expected = run()
    no_room_for_more_than(monkeypatch, 6)
    found, states = kept_by(run)
    assert found.micro_batch == 4
    assert found.history[-1].valid_loss == pytest.approx(expected.history[-1].valid_loss, rel=1e-3)
    monkeypatch.undo()
    assert_same(run(resume=states[3][0]), found)


def test_replicas_without_room_are_trained_fewer_at_a_time(monkeypatch):
    expected = together("features")  # whose features differ from replica to replica
    each, tried = Ensemble._each, []

    def limited(self, function, weights, *arguments, **options):
        if weights.requires_grad:
            tried.append(len(weights))
            if len(weights) > 2:
                raise torch.OutOfMemoryError
        return each(self, function, weights, *arguments, **options)

    monkeypatch.setattr(Ensemble, "_each", limited)
    for mine, theirs in zip(together("features"), expected, strict=True):
        torch.testing.assert_close(mine.model.state_dict(), theirs.model.state_dict())
    assert tried[:5] == [3, 2, 1, 2, 1]


def test_scoring_without_room_takes_fewer_sequences_at_a_time(monkeypatch):
    valid, expected, sizes = successor(17, 1), sequence_totals(build(), successor(17, 1)), []
    answers, each = cat.model.SequenceModel.answers, Ensemble._each
    stack = Ensemble([build(), build()], [0.1, 0.1], optimizer_config=PROTOCOL, precision="float32")
    scores = stack.score(valid)

    def limited(self, tokens, at):
        sizes.append(len(tokens))
        if len(tokens) > room:
            raise torch.OutOfMemoryError
        return answers(self, tokens, at)

    def limited_each(self, function, weights, batch, **options):
        sizes.append(len(batch.inputs))
        if len(batch.inputs) > room:
            raise torch.OutOfMemoryError
        return each(self, function, weights, batch, **options)

    room = 5
    with monkeypatch.context() as patch:
        patch.setattr(cat.model.SequenceModel, "answers", limited)
        for mine, theirs in zip(sequence_totals(build(), valid), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    monkeypatch.setattr(Ensemble, "_each", limited_each)
    assert stack.score(valid) == [pytest.approx(pair) for pair in scores]
    assert [size for size in sizes if size > room] == [17, 9, 17, 9]
    assert sum(size for size in sizes if size <= room) == 2 * 17
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        stack.score(valid)


# A study.


def small_study(folder):
    """Two cells of four runs of seven steps."""
    tiny_study(folder, tasks=["copying"])
    raw = read_params()
    for name, ablation in raw["ablations"].items():
        variants = ["none", "k"] if name == "streams" else []
        ablation |= {"variants": variants, "tasks": ["copying"] if variants else [], "beside": [], "across": []}
    raw["variants"] = {name: raw["variants"][name] for name in ("none", "k")}
    raw["tasks"]["copying"]["train"] |= {"steps": 7, "learning_rates": [0.005, 0.01]}
    write_params(raw)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A study with data, and a cell of four runs as it is when nothing happens: (folder, digests)."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_study(folder)
        stage("plan")
        stage("generate", "copying")
        stage("train", "copying", "k")
        found = digests(Path("runs"))
        assert len(found) == 4
        shutil.rmtree("checkpoints")
        shutil.rmtree("runs")
    return folder, found


@pytest.fixture
def study(planned, tmp_path, monkeypatch):
    shutil.copytree(planned[0], tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.setattr(checkpoints, "EVERY", 0)
    monkeypatch.setattr(checkpoints, "PATIENCE", 0)
    return tmp_path / "study"


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def parts():
    return [path for path in Path().rglob("*.part*") if "checkpoints" not in path.parts]


def in_a_process(function, *arguments, **options):
    """The process in which `function` is called, begun; it can be killed."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def train_until(monkeypatch, owner, name, count, *, how=signal.SIGKILL):
    """Trains the cell in a process that gets a signal when `name` is called for the `count`-th time."""
    function, calls = getattr(owner, name), []

    def called(*arguments, **options):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), how)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, called)
        process = in_a_process(stage, "train", "copying", "k")
        process.join()
    return process.exitcode


def steps_of(monkeypatch):
    """Trains the cell here; how many steps that took."""
    taken, inner = [], cat.training.fit.backward
    with monkeypatch.context() as patch:
        patch.setattr(cat.training.fit, "backward", lambda *a, **o: taken.append(None) or inner(*a, **o))
        stage("train", "copying", "k")
    return len(taken)


@pytest.mark.parametrize(
    ("owner", "name", "count", "steps"),
    [
        (cat.training.fit, "backward", 5, 24),  # in the first run: its four steps are kept
        (cat.training.fit, "backward", 24, 5),  # in the last
        (checkpoints.safetensors.torch, "save", 16, 13),  # a checkpoint is made, and not yet there
        (Path, "replace", 16, 13),
        (training, "write", 1, 0),  # all is trained, nothing written
        (Path, "replace", 29, 0),  # the folder is written under its temporary name
        (runs, "digest", 1, 0),  # and under its own; DVC has not recorded it
    ],
)
def test_a_killed_cell_goes_on_where_it_was(study, planned, monkeypatch, owner, name, count, steps):
    assert train_until(monkeypatch, owner, name, count) == -signal.SIGKILL
    shutil.rmtree("runs", ignore_errors=True)  # as DVC does
    assert steps_of(monkeypatch) == steps
    assert digests(Path("runs")) == planned[1]
    assert parts() == []


def test_what_is_kept_of_a_task_is_given_up_when_it_is_evaluated(study, monkeypatch):
    monkeypatch.setattr(checkpoints, "EVERY", 60)  # runs that have ended are kept however fast they were
    stage("train", "copying", "none")
    stage("train", "copying", "k")
    assert len(list(Path("checkpoints/copying").rglob("*.safetensors"))) == 8
    kept = Path("checkpoints/copying/k/0.01_1.safetensors")
    with FileLock(kept.with_suffix(".lock")):  # another process trains this one anew
        stage("evaluate", "copying")
    assert list(Path("checkpoints/copying").rglob("*.safetensors")) == [kept]
    monkeypatch.setattr(checkpoints, "PATIENCE", 0)
    lock = FileLock(kept.with_suffix(".lock"))
    with lock, pytest.raises(ValueError, match="another process"), Checkpoint(kept, "").alone():
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux says what a file descriptor is of")
def test_what_is_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(to), replace(path, to)))
    with atomic_write(tmp_path / "cell") as folder:
        folder.mkdir()
        (folder / "summary.json").touch()
    part = tmp_path / ".cell.part"
    assert done == [part, part / "summary.json", tmp_path / "cell", tmp_path]


def test_states_are_kept_now_and_then_and_where_the_run_is_stopped(tmp_path, monkeypatch):
    _, states = kept_by(lambda **options: run(steps=2, **options))
    checkpoint = Checkpoint(tmp_path / "here", "key")
    monkeypatch.setattr(checkpoints, "EVERY", 60)
    keep = checkpoints.Keeper([checkpoint], [None])
    keep(lambda: {0: states[0][0]}, False)
    assert checkpoint.read() is None
    monkeypatch.setattr(workers, "_stopping", True)
    with pytest.raises(workers.Stopped):
        keep(lambda: {0: states[0][0]}, False)
    assert checkpoint.read().state.step == 1
    monkeypatch.setattr(workers, "_stopping", False)
    keep.kept -= 61
    keep(lambda: {0: states[1][0]}, False)
    assert checkpoint.read().state.step == 2


def test_the_seconds_of_a_run_are_those_of_all_times_that_it_was_gone_on_with(tmp_path, monkeypatch):
    _, states = kept_by(lambda **options: run(steps=2, **options))
    both, one = [Checkpoint(tmp_path / name, name) for name in ("a", "b")], Checkpoint(tmp_path / "a", "a")
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keep = checkpoints.Keeper(both, [None, None])
    now += 30
    keep(lambda: {0: states[0][0], 1: states[0][0]}, True)
    assert [checkpoint.read().seconds for checkpoint in both] == [15, 15]
    now += 500
    keep = checkpoints.Keeper([one], [one.read()])
    now += 7
    keep(lambda: {0: states[1][0]}, True)
    assert one.read().seconds == keep.seconds(0) == 22


MORE = {"tasks.copying.data.test": 40, "tasks.copying.data.multiples": [1, 2, 3]}
CHANGES = {
    "nothing": (lambda: None, 4),
    "another seed": (lambda: edit(seeds=[0, 1, 2]), 4 + 2 * 7),
    "another learning rate": (lambda: edit(**{"tasks.copying.train.learning_rates": [0.005, 0.02]}), 2 * 7),
    "the schedule": (lambda: edit(**{"tasks.copying.train.steps": 8}), 4 * 8),
    "the protocol": (lambda: edit(**{"train.clip": 0.5}), 4 * 7),
    "the variant": (lambda: edit(**{"variants.k.k": 2}), 4 * 7),
    "the data": (lambda: (edit(data_seed=1), stage("generate", "copying")), 4 * 7),
    "other test sequences": (lambda: (edit(**MORE), stage("generate", "copying")), 4),
    "the code": (lambda: Path("plan/train/k.txt").write_text("code 0123456789abcdef\n"), 4 * 7),
    "no plan": (lambda: shutil.rmtree("plan"), 4 * 7),
    "a bit": (lambda: altered(Path("checkpoints/copying/k/0.01_1.safetensors"), -3), 7),
    "its length": (lambda: os.truncate("checkpoints/copying/k/0.01_1.safetensors", 1000), 7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_something_else_is_passed_over(study, monkeypatch, change):
    """Of the last run three steps are kept, the other three have ended."""
    assert train_until(monkeypatch, cat.training.fit, "backward", 25) == -signal.SIGKILL
    make, steps = CHANGES[change]
    make()
    assert steps_of(monkeypatch) == steps


def test_a_checkpoint_of_other_bits_is_another(study, monkeypatch):
    study = load_study()
    setting = training.CellSetting(
        study.variants["k"], study.optimizer, study.tasks["copying"].training, study.seeds, study.precision
    )
    cell = training.Cell.of("copying", "k", setting)
    usual = training._checkpoint(cell, cell.jobs[0], "a GPU")
    monkeypatch.setenv(MARK, "1")  # deterministic: true, of which the name of a GPU says nothing
    assert training._checkpoint(cell, cell.jobs[0], "a GPU").key not in (usual.key, None)


def altered(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def told_to(path, *arguments, user=None):
    """Runs a stage, what it says going to a file; as another user, where this one may do anything."""
    sys.stderr = path.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    if user and os.geteuid() == 0:
        os.setuid(user)
    stage(*arguments)


# Ctrl-C.


def interrupted(path, *arguments, again=False):
    """Exit code and what was said by a command that gets Ctrl-C when there are checkpoints, and another one, if so asked."""
    process = in_a_process(told_to, path, *arguments)
    deadline = time.monotonic() + 60
    while not list(Path("checkpoints").rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    if again:
        while "Ctrl-C again ends at once" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        while process.is_alive() and time.monotonic() < deadline:  # one that is raised in a finalizer comes to nothing
            os.kill(process.pid, signal.SIGINT)
            process.join(10)
    process.join(60)
    return process.exitcode, path.read_text()


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_cell_after_the_step_that_it_is_in(study, planned, monkeypatch, tmp_path, threads):
    """By one process or several, which a signal to the first of them reaches."""
    edit(threads=threads)
    inner = cat.training.fit.backward
    with monkeypatch.context() as patch:
        patch.setattr(cat.training.fit, "backward", lambda *a, **o: time.sleep(0.2) or inner(*a, **o))
        code, said = interrupted(tmp_path / "said", "train", "copying", "k")
    assert code == 130
    assert said.strip().splitlines() == ["keeping what is done; Ctrl-C again ends at once", "train: interrupted"]
    assert not Path("runs").exists()
    edit(threads=1)
    monkeypatch.setattr(checkpoints, "EVERY", 60)
    assert 0 < steps_of(monkeypatch) < 27
    assert digests(Path("runs")) == planned[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_twice_ends_a_cell_at_once(study, monkeypatch, tmp_path, threads):
    edit(threads=threads)
    calls, inner = [], cat.training.fit.backward

    def hangs(*arguments, **options):
        calls.append(None)
        time.sleep(60 if len(calls) > 2 else 0)
        return inner(*arguments, **options)

    monkeypatch.setattr(cat.training.fit, "backward", hangs)
    start = time.monotonic()
    code, said = interrupted(tmp_path / "said", "train", "copying", "k", again=True)
    assert code == 130
    assert said.splitlines()[-1] == "train: interrupted"
    assert time.monotonic() - start < 30


def test_cells_in_training_come_to_a_stop_and_no_other_is_begun(tmp_path):
    interrupted = []

    def interrupt(index, message):
        if not interrupted:  # a second one would end this process
            interrupted.append(index)
            os.kill(os.getpid(), signal.SIGINT)

    jobs = [tmp_path / str(number) for number in range(4)]
    outcomes = []
    with pytest.raises(workers.Stopped), workers.stoppable():
        outcomes += workers.run_jobs(until_stopped, jobs, devices=[CPU, CPU], method="fork", report=interrupt)
    assert outcomes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.kept", "1.kept"]
    assert not workers.stopping()


def until_stopped(path, device, report):
    deadline = time.monotonic() + 30
    report(None)
    while not workers.stopping() and time.monotonic() < deadline:
        time.sleep(0.01)
    path.with_suffix(".kept").touch()
    raise workers.Stopped


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the locks must do")
def test_a_stage_ends_with_the_dvc_that_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    dvc = in_a_process(starts_a_stage, tmp_path / "pid")
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    dvc.kill()
    pid = (tmp_path / "pid").read_text()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def starts_a_stage(path):
    if os.fork() == 0:
        _end_with_dvc()
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").rename(path)
    time.sleep(60)


def alive(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_ctrl_c_in_a_stage_that_dvc_runs_is_one_here():
    with pytest.raises(KeyboardInterrupt), readable_dvc_errors():
        raise ReproductionError("plan") from StageCmdFailedError("python -m pipeline plan", 130)
    with pytest.raises(ValueError, match="exited with 2"), readable_dvc_errors():
        raise ReproductionError("plan") from StageCmdFailedError("python -m pipeline plan", 2)


def test_what_dvc_left_half_written_is_mended_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scheduler, "stale_cells", None)
    Path("params.yaml").write_text((ROOT / "presets" / "smoke.yaml").read_text())
    Path("dvc.yaml").write_text("stages: {plan: {cmd: 'true'}, generate: {cmd: 'true'}}")
    Repo.init(no_scm=True).close()
    RWLOCK.write_text('{"read": {')
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  plan:\n    cmd")
    with pytest.raises(ValueError, match=r"dvc.lock' validation failed.*; remove dvc.lock and run it again: what has been run"):
        scheduler.run(jobs=1)
    assert not RWLOCK.exists()


# Files.


def refusal(capfd, *arguments):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stopped:
        stage(*arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_half_written(study, planned, capfd, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        assert refusal(capfd, "generate", "copying") == "generate: data/copying: File too large"
        line = refusal(capfd, "train", "copying", "k")
        monkeypatch.setattr(Checkpoint, "write", lambda *_: None)
        other = refusal(capfd, "train", "copying", "k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert line == "train: checkpoints/copying/k/0.005_0.safetensors: File too large"
    assert other == "train: runs/copying/k: File too large"
    assert parts() == [] == list(Path("runs/copying").iterdir())
    monkeypatch.undo()
    os.chdir(study)
    stage("train", "copying", "k")
    assert digests(Path("runs")) == planned[1]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, atomic_write(tmp_path / "out") as part:  # noqa: PT012
        part.symlink_to("/dev/full")
        part.write_bytes(bytes(1 << 16))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(study, tmp_path):
    Path().chmod(0o555)

    process = in_a_process(told_to, tmp_path / "said", "train", "copying", "k", user=65534)
    process.join()
    Path().chmod(0o755)
    assert process.exitcode == 2
    assert (tmp_path / "said").read_text() == "train: checkpoints: Permission denied\n"


def test_two_at_once_are_refused_in_words(study, capfd):
    checkpoint = Checkpoint(Path("checkpoints/copying/k/0.005_0.safetensors"), None)
    with checkpoint.alone():
        line = refusal(capfd, "train", "copying", "k")
    assert line == f"train: {checkpoint.path}: another process trains this run; wait for it, or end it"
    assert not Path("runs").exists()
    stage("train", "copying", "k")


def test_a_clock_that_is_put_back_changes_nothing(study, planned, monkeypatch):
    hours = iter(range(1000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    monkeypatch.setattr(workers, "work", lambda function, jobs, **_: ((i, function(j, CPU, print)) for i, j in enumerate(jobs)))
    study = load_study()
    setting = training.CellSetting(
        study.variants["k"], study.optimizer, study.tasks["copying"].training, study.seeds, study.precision
    )
    stale = scheduler.StageCell("train", training.Cell.of("copying", "k", setting), {})
    assert [failure for _, failure in scheduler.train([stale], [CPU])] == [None]
    assert digests(Path("runs")) == planned[1]
    assert 0 < read_json(Path("logs/copying/k.json"))["seconds"] < 600


READERS = {
    "data/copying/meta.json": (lambda: read_meta("copying"),),
    "data/copying/train.npz": (lambda: read_split("copying", "train"),),
    "heldout/copying/meta.json": (lambda: read_task("copying"),),
    "heldout/copying/test_32.npz": (lambda: read_split("copying", "test_32"),),
    "runs/copying/k/summary.json": (lambda: runs.read_summary("copying", "k"), lambda: runs.max_length("copying", "k")),
    "runs/copying/k/seed_0.safetensors": (lambda: runs.load_model("runs/copying/k/seed_0.safetensors"),),
}


@pytest.fixture(scope="module")
def trained(planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "study"
    shutil.copytree(planned[0], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage("train", "copying", "k")
        stage("train", "copying", "none")
    return folder


SPOILT = {
    "shortened": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "something else": lambda path: path.write_bytes(b"\x80\x04}\x94."),  # a pickle
    "other JSON": lambda path: path.write_text("[]"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_spoilt_is_named_in_one_line(trained, tmp_path, monkeypatch, name, how):
    shutil.copytree(trained, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    SPOILT[how](Path(name))
    for reader in READERS[name]:
        with pytest.raises(ValueError, match="`dvc repro`") as raised:
            reader()
        assert str(raised.value).startswith(f"{name}: is ")
        assert len(str(raised.value).splitlines()) == 1


def test_weights_of_another_variant_are_refused(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    path = runs.weights_path("copying", "k", 0)
    shutil.copy(runs.weights_path("copying", "none", 0), path)
    with pytest.raises(ValueError, match=r"seed_0.safetensors: is of another model than runs/copying/k/summary.json"):
        runs.load_model(path)


def test_weights_that_do_not_fit_their_configuration_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    source = trained / runs.weights_path("copying", "k", 0)
    about = json.dumps(read_json(source.with_name("summary.json"))["model"])
    weights = load_file(source)
    for changed in ({"more": torch.ones(1)}, {"head.weight": weights["head.weight"][:, 1:].clone()}):
        save_file({**weights, **changed}, tmp_path / "w.safetensors", metadata={"model": about})
        with pytest.raises(ValueError, match="is not a weights file of this project, or damaged") as raised:
            runs.load_model(tmp_path / "w.safetensors")
        assert len(str(raised.value).splitlines()) == 1
