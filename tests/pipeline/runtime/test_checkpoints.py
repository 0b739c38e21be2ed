"""Training survives kills, Ctrl-C and lack of memory or disk; a resumed run gives the same bits."""

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
from cat.config import TrainingConfig
from cat.evaluation.scores import MixedSplit, Split, sequence_totals
from cat.mixers.registry import model_config
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
from tests.helpers.study import ROOT, edit, keep_ablation, read_params, stage, tiny_study

CPU = torch.device("cpu")
VOCABULARY, LENGTH = 11, 7
TRAINING = TrainingConfig(
    steps=13, batch=16, weight_decay=0.1, grad_clip=1.0, warmup=0.1, eval_every=5, early_stop_accuracy=0.9, early_stop_patience=2
)
MODELS = {
    "filters": model_config(mixer="attention", width=12, layers=2, heads=2, conv_q=3, conv_k=3, tied=True),
    "mamba": model_config(mixer="mamba", width=12, layers=1),
    "features": model_config(mixer="performer", width=12, layers=1, heads=2, features=4),
}


def successor(count, seed, length=LENGTH):
    """The next number as target at every other token; some examples have one target fewer."""
    inputs = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    targets = torch.full_like(inputs, -100)
    targets[:, 2::2] = (inputs[:, 2::2] + 1) % VOCABULARY
    targets[::3, 2] = -100
    return Split.of(inputs, targets)


def build(name="filters", seed=3):
    return build_model(MODELS[name], vocabulary=VOCABULARY, length=LENGTH, seed=seed)


MIXED = MixedSplit((successor(33, 0, length=5), successor(50, 0)))


def run(name="filters", *, steps=23, rate=0.03, train=None, **options):
    """A run with three steps per epoch and a validation every five."""
    config = TRAINING.model_copy(update={"steps": steps})
    options = {"seed": 2, "stop_early": True, **options}
    return fit(build(name), train or successor(50, 0), successor(17, 1), config=config, learning_rate=rate, **options)


def with_states(train):
    """The result of `train` and the state after each of its steps."""
    states = []
    return train(checkpoint=lambda state, ended: states.append((state(), ended))), states


def assert_same(first, second):
    assert (first.history, first.steps, first.stop) == (second.history, second.steps, second.stop)
    weights = second.model.state_dict()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight.nan_to_num(7), weights[name].nan_to_num(7)), name


@pytest.mark.parametrize(("name", "train"), [*((name, None) for name in MODELS), ("filters", MIXED)])
def test_a_run_resumed_at_any_step_gives_the_same_bits(name, train):
    whole_run, states = with_states(lambda **options: run(name, train=train, stop_early=False, **options))
    assert whole_run.stop == "steps"
    assert [ended for _, ended in states] == [False] * 22 + [True]
    for state, _ in [states[0], states[4], states[7], states[15], states[-1]]:
        assert_same(run(name, train=train, stop_early=False, resume=state), whole_run)
    assert_same(whole_run, run(name, train=train, stop_early=False))


def test_a_run_that_stopped_early_is_not_continued(monkeypatch):
    stopped, states = with_states(lambda **options: run(steps=400, **options))
    assert stopped.stop == "accuracy"
    for state, _ in states[-2:]:
        assert_same(run(steps=400, resume=state), stopped)
    monkeypatch.setattr(cat.training.fit, "backward", None)
    assert_same(run(steps=400, resume=states[-1][0]), stopped)


def test_a_resumed_run_diverges_at_the_same_step(monkeypatch):
    lr_scale = cat.training.fit.lr_scale
    monkeypatch.setattr(cat.training.fit, "lr_scale", lambda step, *rest: math.nan if step == 6 else lr_scale(step, *rest))
    diverged, states = with_states(run)
    assert (diverged.stop, diverged.steps) == ("diverged", 7)
    for index in (2, 4, 5, -1):
        assert_same(run(resume=states[index][0]), diverged)


def fit_three(name="filters", **options):
    models = [build(name, seed=seed) for seed in (0, 1, 2)]
    options = {"config": TRAINING, "learning_rates": (0.01, 0.2, 0.03), **options}
    return fit_ensemble(models, successor(50, 0), successor(17, 1), seeds=(4, 5, 6), stop_early=False, **options)


@pytest.mark.parametrize("step", [3, 5])
def test_an_ensemble_is_resumed_from_its_states(step):
    expected, states = with_states(fit_three)
    assert [ended for _, ended in states] == [False] * 12 + [True]
    members = states[step - 1][0]
    assert list(members) == [0, 1, 2]
    for actual, reference in zip(fit_three(resume=list(members.values())), expected, strict=True):
        assert_same(actual, reference)
    # A single member is resumed by `fit`, which adds in another order.
    options = {"config": TRAINING, "learning_rate": 0.2, "stop_early": False}
    single = fit(build(seed=1), successor(50, 0), successor(17, 1), seed=5, resume=members[1], **options)
    assert [record.step for record in single.history] == [5, 10, 13]
    assert single.history[-1].valid_loss == pytest.approx(expected[1].history[-1].valid_loss, rel=1e-3)


# Memory.


def limit_batch(monkeypatch, size):
    """Make batches of more than `size` examples run out of memory in training."""
    logits_at = cat.model.SequenceModel.logits_at

    def limited(self, tokens, positions):
        if len(tokens) > size and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return logits_at(self, tokens, positions)

    monkeypatch.setattr(cat.model.SequenceModel, "logits_at", limited)


def test_runs_at_the_same_step_are_resumed_together(monkeypatch):
    """A run that has ended or that splits its batches is resumed by itself, since an ensemble cannot split batches."""
    jobs = [training.Job(0.1, seed) for seed in range(7)]
    saved = {1: (5, None, None), 2: (5, None, None), 3: (5, 8, None), 4: (5, 8, None), 5: (5, None, "accuracy")}

    def checkpoint(cell, job, where):
        step, micro_batch, stop = saved.get(job.seed, (None, None, None))
        state = SimpleNamespace(step=step, micro_batch=micro_batch, stop=stop)
        return SimpleNamespace(read=lambda: checkpoints.SavedRun(state, 1.0) if step else None)

    monkeypatch.setattr(training, "_checkpoint", checkpoint)
    groups = [[job.seed for job in members] for members in training._group_by_step(None, tuple(jobs), "here")]
    assert groups == [[0, 6], [1, 2], [3], [4], [5]]


def test_a_batch_that_does_not_fit_is_split_with_the_same_gradient(monkeypatch):
    batch = successor(17, 0).rows(slice(None))
    whole_model, split_model = build(), build()
    loss, micro_batch = backward(whole_model, batch)
    assert micro_batch is None
    limit_batch(monkeypatch, 6)
    split_loss, micro_batch = backward(split_model, batch)
    assert micro_batch == 5  # 17, 9, 5
    torch.testing.assert_close(split_loss, loss)
    for actual, reference in zip(split_model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, reference.grad)
    limit_batch(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        backward(build(), batch)


def test_gradients_before_running_out_of_memory_are_dropped(monkeypatch):
    batch, expected, split_model = successor(16, 0).rows(slice(None)), build(), build()
    backward(expected, batch)
    mean_loss, calls = cat.training.fit.mean_loss, []

    def fails_second(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return mean_loss(*arguments, **options)

    monkeypatch.setattr(cat.training.fit, "mean_loss", fails_second)
    assert backward(split_model, batch, micro_batch=8)[1] == 4
    for actual, reference in zip(split_model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, reference.grad)


def test_a_run_resumes_with_the_micro_batch_that_fits(monkeypatch):
    expected = run()
    limit_batch(monkeypatch, 6)
    actual, states = with_states(run)
    assert actual.micro_batch == 4
    assert actual.history[-1].valid_loss == pytest.approx(expected.history[-1].valid_loss, rel=1e-3)
    monkeypatch.undo()
    assert_same(run(resume=states[3][0]), actual)


def test_an_ensemble_that_does_not_fit_trains_fewer_members_at_a_time(monkeypatch):
    expected = fit_three("features")  # the random features differ between members
    vmap, sizes = Ensemble._vmap, []

    def limited(self, function, weights, *arguments, **options):
        if weights.requires_grad:
            sizes.append(len(weights))
            if len(weights) > 2:
                raise torch.OutOfMemoryError
        return vmap(self, function, weights, *arguments, **options)

    monkeypatch.setattr(Ensemble, "_vmap", limited)
    for actual, reference in zip(fit_three("features"), expected, strict=True):
        torch.testing.assert_close(actual.model.state_dict(), reference.model.state_dict())
    assert sizes[:5] == [3, 2, 1, 2, 1]


def test_scoring_that_does_not_fit_takes_fewer_sequences_at_a_time(monkeypatch):
    valid, expected, sizes = successor(17, 1), sequence_totals(build(), successor(17, 1)), []
    logits_at, vmap = cat.model.SequenceModel.logits_at, Ensemble._vmap
    ensemble = Ensemble([build(), build()], [0.1, 0.1], config=TRAINING, precision="float32")
    scores = ensemble.score(valid)

    def limited(self, tokens, positions):
        sizes.append(len(tokens))
        if len(tokens) > limit:
            raise torch.OutOfMemoryError
        return logits_at(self, tokens, positions)

    def limited_vmap(self, function, weights, batch, **options):
        sizes.append(len(batch.inputs))
        if len(batch.inputs) > limit:
            raise torch.OutOfMemoryError
        return vmap(self, function, weights, batch, **options)

    limit = 5
    with monkeypatch.context() as patch:
        patch.setattr(cat.model.SequenceModel, "logits_at", limited)
        for actual, reference in zip(sequence_totals(build(), valid), expected, strict=True):
            torch.testing.assert_close(actual, reference)
    monkeypatch.setattr(Ensemble, "_vmap", limited_vmap)
    assert ensemble.score(valid) == [pytest.approx(pair) for pair in scores]
    assert [size for size in sizes if size > limit] == [17, 9, 17, 9]
    assert sum(size for size in sizes if size <= limit) == 2 * 17
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        ensemble.score(valid)


# A study.


def small_study(folder):
    """Two cells of four runs of seven steps."""
    tiny_study(folder, tasks=["copying"])
    keep_ablation("qkv_subsets", tasks=["copying"], variants=["none", "k"])
    edit(**{"tasks.copying.training": {"steps": 7, "learning_rates": [0.005, 0.01]}})


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A study with data, and the digests of a cell of four runs trained without interruption: (folder, digests)."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_study(folder)
        stage("plan")
        stage("generate", "copying")
        stage("train", "copying", "k")
        expected = digests(Path("runs"))
        assert len(expected) == 6  # weights of each seed and learning rate, summary and history
        shutil.rmtree("checkpoints")
        shutil.rmtree("runs")
    return folder, expected


@pytest.fixture
def study(planned, tmp_path, monkeypatch):
    shutil.copytree(planned[0], tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.setattr(checkpoints, "INTERVAL_SECONDS", 0)
    monkeypatch.setattr(checkpoints, "LOCK_TIMEOUT", 0)
    return tmp_path / "study"


@pytest.fixture(scope="module")
def killed_study(planned, tmp_path_factory):
    """The study after training was killed in the last run: three of its steps are saved, the other three runs have ended."""
    folder = tmp_path_factory.mktemp("killed") / "study"
    shutil.copytree(planned[0], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(checkpoints, "INTERVAL_SECONDS", 0)
        assert train_until(patch, cat.training.fit, "backward", 25) == -signal.SIGKILL
    return folder


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def temporary_files():
    return [path for path in Path().rglob("*.part*") if "checkpoints" not in path.parts]


def in_a_process(function, *arguments, **options):
    """Start a process that calls `function`, so that it can be killed."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def train_until(monkeypatch, owner, name, count, *, how=signal.SIGKILL):
    """Train the cell in a process that gets a signal at call number `count` of `name`."""
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


def checkpoint_files():
    return set(Path("checkpoints/copying").rglob("*.safetensors"))


def count_steps(monkeypatch):
    """Train the cell in this process and return the number of steps."""
    steps, inner = [], cat.training.fit.backward
    with monkeypatch.context() as patch:
        patch.setattr(cat.training.fit, "backward", lambda *a, **o: steps.append(None) or inner(*a, **o))
        stage("train", "copying", "k")
    return len(steps)


@pytest.mark.parametrize(
    ("owner", "name", "count", "steps"),
    [
        (cat.training.fit, "backward", 5, 24),  # in the first run, with four steps saved
        (cat.training.fit, "backward", 24, 5),  # in the last run
        (checkpoints.safetensors.torch, "save", 16, 13),  # before a checkpoint is written
        (Path, "replace", 16, 13),
        (training, "write", 1, 0),  # all runs are trained, nothing is written
        (Path, "replace", 29, 0),  # the folder is written under its temporary name
        (runs, "digest", 1, 0),  # the folder is written, DVC has not recorded it
    ],
)
def test_a_killed_cell_is_resumed(study, planned, monkeypatch, owner, name, count, steps):
    assert train_until(monkeypatch, owner, name, count) == -signal.SIGKILL
    shutil.rmtree("runs", ignore_errors=True)  # as DVC does
    assert count_steps(monkeypatch) == steps
    assert digests(Path("runs")) == planned[1]
    assert temporary_files() == []


def test_evaluating_a_task_removes_the_checkpoints_of_runs_that_are_not_in_the_study(study, monkeypatch):
    monkeypatch.setattr(checkpoints, "INTERVAL_SECONDS", 60)  # finished runs are saved in any case
    stage("train", "copying", "none")
    stage("train", "copying", "k")
    saved = checkpoint_files()
    assert len(saved) == 8
    stage("evaluate", "copying")
    assert checkpoint_files() == saved
    edit(**{"ablations.qkv_subsets.variants": ["k"], "tasks.copying.training.learning_rates": [0.005]})
    edit(variants={"k": read_params()["variants"]["k"]})
    locked = Path("checkpoints/copying/k/0.01_1.safetensors")
    with FileLock(locked.with_suffix(".lock")):  # another process is training this run again
        stage("evaluate", "copying")
    kept = [Path(f"checkpoints/copying/k/0.005_{seed}.safetensors") for seed in (0, 1)]
    assert checkpoint_files() == {*kept, locked}
    lock = FileLock(locked.with_suffix(".lock"))
    with lock, pytest.raises(ValueError, match="another process"), Checkpoint(locked, "").exclusive():
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name the file of a descriptor")
def test_files_are_flushed_to_disk_before_they_are_renamed(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (calls.append(to), replace(path, to)))
    with atomic_write(tmp_path / "cell") as folder:
        folder.mkdir()
        (folder / "summary.json").touch()
    part = tmp_path / ".cell.part"
    assert calls == [part, part / "summary.json", tmp_path / "cell", tmp_path]


def test_states_are_saved_every_minute_and_when_the_run_is_stopped(tmp_path, monkeypatch):
    _, states = with_states(lambda **options: run(steps=2, **options))
    checkpoint = Checkpoint(tmp_path / "checkpoint", "key")
    monkeypatch.setattr(checkpoints, "INTERVAL_SECONDS", 60)
    writer = checkpoints.CheckpointWriter([checkpoint], [None])
    writer(lambda: {0: states[0][0]}, False)
    assert checkpoint.read() is None
    monkeypatch.setattr(workers, "_stopping", True)
    with pytest.raises(workers.Stopped):
        writer(lambda: {0: states[0][0]}, False)
    assert checkpoint.read().state.step == 1
    monkeypatch.setattr(workers, "_stopping", False)
    writer.last_saved -= 61
    writer(lambda: {0: states[1][0]}, False)
    assert checkpoint.read().state.step == 2


def test_the_seconds_of_a_run_add_up_over_all_sessions(tmp_path, monkeypatch):
    _, states = with_states(lambda **options: run(steps=2, **options))
    both, first = [Checkpoint(tmp_path / name, name) for name in ("a", "b")], Checkpoint(tmp_path / "a", "a")
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    writer = checkpoints.CheckpointWriter(both, [None, None])
    now += 30
    writer(lambda: {0: states[0][0], 1: states[0][0]}, True)
    assert [checkpoint.read().seconds for checkpoint in both] == [15, 15]
    now += 500
    writer = checkpoints.CheckpointWriter([first], [first.read()])
    now += 7
    writer(lambda: {0: states[1][0]}, True)
    assert first.read().seconds == writer.seconds(0) == 22


MORE = {"tasks.copying.data.test_examples": 40, "tasks.copying.data.multiples": [1, 2, 3]}
CHANGES = {
    "nothing": (lambda: None, 4),
    "another seed": (lambda: edit(**{"defaults.training.seeds": [0, 1, 2]}), 4 + 2 * 7),
    "another learning rate": (lambda: edit(**{"tasks.copying.training.learning_rates": [0.005, 0.02]}), 2 * 7),
    "the training": (lambda: edit(**{"tasks.copying.training.steps": 8}), 4 * 8),
    "a default": (lambda: edit(**{"defaults.training.grad_clip": 0.5}), 4 * 7),
    "the variant": (lambda: edit(**{"variants.k.conv_k": 2}), 4 * 7),
    "the data": (lambda: (edit(data_seed=1), stage("generate", "copying")), 4 * 7),
    "other test sequences": (lambda: (edit(**MORE), stage("generate", "copying")), 4),
    "the code": (lambda: Path("plan/train/copying/k.json").write_text('{"code": "0123456789abcdef"}'), 4 * 7),
    "no plan": (lambda: shutil.rmtree("plan"), 4 * 7),
    "a bit": (lambda: flip_bit(Path("checkpoints/copying/k/0.01_1.safetensors"), -3), 7),
    "its length": (lambda: os.truncate("checkpoints/copying/k/0.01_1.safetensors", 1000), 7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_another_key_is_ignored(killed_study, tmp_path, monkeypatch, change):
    shutil.copytree(killed_study, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    apply_change, steps = CHANGES[change]
    apply_change()
    assert count_steps(monkeypatch) == steps


def test_the_key_of_a_checkpoint_depends_on_determinism(study, monkeypatch):
    study = load_study()
    cell = training.Cell.of("copying", "k", training.CellSetting.of(study, "copying", "k"))
    usual = training._checkpoint(cell, cell.jobs[0], "a GPU")
    monkeypatch.setenv(MARK, "1")  # deterministic: true, which the name of a GPU does not show
    assert training._checkpoint(cell, cell.jobs[0], "a GPU").key not in (usual.key, None)


def flip_bit(path, index):
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def run_stage(path, *arguments, user=None):
    """Run a stage with stderr going to a file; as another user if this one is root."""
    sys.stderr = path.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    if user and os.geteuid() == 0:
        os.setuid(user)
    stage(*arguments)


# Ctrl-C.


def interrupted(path, *arguments, again=False):
    """Send Ctrl-C to a command once there are checkpoints, twice if `again`; return its exit code and its messages."""
    process = in_a_process(run_stage, path, *arguments)
    deadline = time.monotonic() + 60
    while not list(Path("checkpoints").rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    if again:
        while "Press Ctrl-C again" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        while process.is_alive() and time.monotonic() < deadline:  # an interrupt in a finalizer is lost
            os.kill(process.pid, signal.SIGINT)
            process.join(10)
    process.join(60)
    return process.exitcode, path.read_text()


@pytest.mark.parametrize("parallel_runs", [1, 2])
def test_ctrl_c_ends_a_cell_after_the_current_step(study, planned, monkeypatch, tmp_path, parallel_runs):
    """A signal to the first of several processes reaches all of them."""
    edit(parallel_runs=parallel_runs)
    inner = cat.training.fit.backward
    with monkeypatch.context() as patch:
        patch.setattr(cat.training.fit, "backward", lambda *a, **o: time.sleep(0.2) or inner(*a, **o))
        code, messages = interrupted(tmp_path / "messages", "train", "copying", "k")
    assert code == 130
    first, last = messages.strip().splitlines()
    assert first.startswith("Stopping after this step")
    assert last == "train: interrupted"
    assert not Path("runs").exists()
    edit(parallel_runs=1)
    monkeypatch.setattr(checkpoints, "INTERVAL_SECONDS", 60)
    assert 0 < count_steps(monkeypatch) < 27
    assert digests(Path("runs")) == planned[1]


@pytest.mark.parametrize("parallel_runs", [1, 2])
def test_ctrl_c_twice_ends_a_cell_at_once(study, monkeypatch, tmp_path, parallel_runs):
    edit(parallel_runs=parallel_runs)
    calls, inner = [], cat.training.fit.backward

    def hangs(*arguments, **options):
        calls.append(None)
        time.sleep(60 if len(calls) > 2 else 0)
        return inner(*arguments, **options)

    monkeypatch.setattr(cat.training.fit, "backward", hangs)
    start = time.monotonic()
    code, messages = interrupted(tmp_path / "messages", "train", "copying", "k", again=True)
    assert code == 130
    assert messages.splitlines()[-1] == "train: interrupted"
    assert time.monotonic() - start < 30


def test_running_jobs_stop_and_no_other_job_is_started(tmp_path):
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.saved", "1.saved"]
    assert not workers.stopping()


def until_stopped(path, device, report):
    deadline = time.monotonic() + 30
    report(None)
    while not workers.stopping() and time.monotonic() < deadline:
        time.sleep(0.01)
    path.with_suffix(".saved").touch()
    raise workers.Stopped


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent; elsewhere, locks help")
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


def test_ctrl_c_in_a_stage_that_dvc_runs_is_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt), readable_dvc_errors():
        raise ReproductionError("plan") from StageCmdFailedError("python -m pipeline plan", 130)
    with pytest.raises(ValueError, match="exited with 2"), readable_dvc_errors():
        raise ReproductionError("plan") from StageCmdFailedError("python -m pipeline plan", 2)


def test_a_damaged_rwlock_is_removed_and_a_damaged_lock_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scheduler, "stale_cells", None)
    Path("params.yaml").write_text((ROOT / "presets" / "smoke.yaml").read_text())
    Path("dvc.yaml").write_text("stages: {plan: {cmd: 'true'}, generate: {cmd: 'true'}}")
    Repo.init(no_scm=True).close()
    RWLOCK.write_text('{"read": {')
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  plan:\n    cmd")
    with pytest.raises(ValueError, match=r"dvc.lock' validation failed.*; remove dvc.lock and run it again"):
        scheduler.run(jobs=1)
    assert not RWLOCK.exists()


# Files.


def refusal(capfd, *arguments):
    """Return the one line of a command that fails."""
    with pytest.raises(SystemExit) as stopped:
        stage(*arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


def test_a_file_that_cannot_be_written_is_named_and_no_part_of_it_is_left(study, planned, capfd, monkeypatch):
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
    assert temporary_files() == [] == list(Path("runs/copying").iterdir())
    monkeypatch.undo()
    os.chdir(study)
    stage("train", "copying", "k")
    assert digests(Path("runs")) == planned[1]


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, atomic_write(tmp_path / "out") as part:  # noqa: PT012
        part.symlink_to("/dev/full")
        part.write_bytes(bytes(1 << 16))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(study, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are closed to other users
        if "pytest" in str(folder):
            folder.chmod(0o755)
    Path().chmod(0o555)
    process = in_a_process(run_stage, tmp_path / "messages", "train", "copying", "k", user=65534)
    process.join()
    Path().chmod(0o755)
    assert process.exitcode == 2
    assert (tmp_path / "messages").read_text() == "train: checkpoints: Permission denied\n"


def test_two_processes_cannot_train_the_same_run(study, capfd):
    checkpoint = Checkpoint(Path("checkpoints/copying/k/0.005_0.safetensors"), None)
    with checkpoint.exclusive():
        line = refusal(capfd, "train", "copying", "k")
    assert line.startswith(f"train: {checkpoint.path}: another process is training this run")
    assert not Path("runs").exists()
    stage("train", "copying", "k")


def test_a_clock_that_is_set_back_changes_nothing(study, planned, monkeypatch):
    hours = iter(range(1000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    monkeypatch.setattr(
        workers, "run_jobs", lambda function, jobs, **_: ((i, function(j, CPU, print)) for i, j in enumerate(jobs))
    )
    setting = training.CellSetting.of(load_study(), "copying", "k")
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


DAMAGES = {
    "shortened": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04}\x94."),
    "other JSON": lambda path: path.write_text("[]"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_in_one_line(trained, tmp_path, monkeypatch, name):
    shutil.copytree(trained, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    content = Path(name).read_bytes()
    for how, damage in DAMAGES.items():
        Path(name).write_bytes(content)
        damage(Path(name))
        for reader in READERS[name]:
            with pytest.raises(ValueError, match="`dvc repro`") as raised:
                reader()
            assert str(raised.value).startswith(f"{name}: is "), how
            assert len(str(raised.value).splitlines()) == 1, how


def test_weights_of_another_variant_are_refused(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    path = runs.weights_path("copying", "k", 0)
    shutil.copy(runs.weights_path("copying", "none", 0), path)
    with pytest.raises(ValueError, match=r"seed_0.safetensors: is of another model"):
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
