"""A run on several processes equals the run on one up to rounding, and is the same on all, also after interruptions."""

import hashlib
import multiprocessing
import os
import signal
import socket
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import torch

import cat.training.fit
from cat.model import SequenceModel
from cat.training.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from cat.training.fit import backward, fit
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.runtime import workers
from pipeline.runtime.devices import describe, own_device
from pipeline.stages import train as training
from pipeline.storage.files import read_json
from tests.helpers.study import stage, tiny_study
from tests.pipeline.runtime.test_checkpoints import CPU, MIXED, TRAINING, build, digests, successor


def in_processes(count, function):
    """Call `function(rank)` in `count` processes, as torchrun starts them, and return the results.

    The result of a failed process is its exit code.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    results = context.SimpleQueue()

    def serve(rank):
        os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
        results.put((rank, function(rank)))

    processes = [context.Process(target=serve, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    outcomes = {rank: process.exitcode for rank, process in enumerate(processes)}
    while not results.empty():
        rank, result = results.get()
        outcomes[rank] = result
    return [outcomes[rank] for rank in range(count)]


def run(group=SINGLE_PROCESS, *, batch=16, train=None, **options):
    """Train and return the digest of the weights, the steps, the stop reason, the micro-batch size and the history."""
    config = TRAINING.model_copy(update={"steps": 400, "batch": batch})
    options = {"learning_rate": 0.03, "seed": 2, "stop_early": True, **options}
    run = fit(build(), train or successor(50, 0), successor(17, 1), config=config, group=group, **options)
    weights = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in run.model.state_dict().values()))
    return weights.hexdigest(), run.steps, run.stop, run.micro_batch, [vars(record) for record in run.history]


def run_in_group(rank, train=None):
    with process_group(CPU) as group:
        assert (group.rank, group.broadcast(lambda: rank)) == (rank, 0)
        return run(group, batch=17, train=train)


def assert_close(history, expected):
    """Up to 1e-4, the rounding of float32 after a few hundred steps."""
    for actual_record, expected_record in zip(history, expected, strict=True):
        assert actual_record == pytest.approx(expected_record, rel=1e-4)


@pytest.mark.parametrize("train", [None, MIXED], ids=["one length", "two lengths"])
def test_several_processes_train_the_run_of_one(train):
    """Nothing divides evenly: batches of 17, 17 validation examples, varying numbers of targets."""
    first, *others = in_processes(3, lambda rank: run_in_group(rank, train))
    assert others == [first] * 2
    _, steps, stop, micro_batch, history = run(batch=17, train=train)
    assert first[1:4] == (steps, stop, micro_batch) == (steps, "accuracy", None)
    assert_close(first[4], history)


class IsolatedProcess(ProcessGroup):
    """One of several processes, without communication."""

    def all_reduce_sum(self, tensor):
        return tensor

    def all_reduce_max(self, number):
        return number

    def broadcast(self, function):
        return function()


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_gradients_of_slices_sum_to_that_of_the_batch(size, micro_batch):
    batch, model = successor(17, 0).rows(slice(None)), build().double()
    loss, _ = backward(model, batch)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    losses = [backward(model, batch, micro_batch=micro_batch, group=IsolatedProcess(rank, size))[0] for rank in range(size)]
    torch.testing.assert_close(sum(losses), loss)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_local_slices_cover_all_examples_and_have_nearly_equal_sizes(size):
    examples = list(range(17))
    slices = [examples[IsolatedProcess(rank, size).local_slice(17)] for rank in range(size)]
    assert list(chain(*slices)) == examples
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_if_one_process_runs_out_of_memory_all_use_smaller_micro_batches():
    logits_at = SequenceModel.logits_at

    def short_of_memory(rank):
        def limited(self, tokens, positions):
            if rank == 1 and len(tokens) > 3 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError
            return logits_at(self, tokens, positions)

        SequenceModel.logits_at = limited  # only in this forked process
        return run_in_group(rank)

    first, second = in_processes(2, short_of_memory)
    assert first == second
    assert first[3] == 3  # 9, 5, 3
    assert_close(first[4], run(batch=17)[4])


@pytest.mark.parametrize(("batch", "size"), [(3, 4), (40, 18)])
def test_more_processes_than_examples_are_refused(batch, size):
    with pytest.raises(ValueError, match=f"^{size} processes.* {batch} examples and 17 validation"):
        run(IsolatedProcess(0, size), batch=batch)


def test_if_one_process_dies_the_other_fails():
    def killed(rank):
        lr_scale = cat.training.fit.lr_scale

        def kill_at_seven(step, *others):
            if (rank, step) == (1, 7):
                os.kill(os.getpid(), signal.SIGKILL)
            return lr_scale(step, *others)

        cat.training.fit.lr_scale = kill_at_seven
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide the traceback
        return run_in_group(rank)

    assert in_processes(2, killed) == [1, -signal.SIGKILL]


def test_a_cell_resumes_to_the_same_bits_after_one_process_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    stage("plan")
    stage("generate", "copying")
    study = load_study()
    setting = training.CellSetting.of(study, "copying", "k")
    setting = setting._replace(training=setting.training.model_copy(update={"steps": 20}))

    def train(rank, until=None):
        lr_scale, steps = cat.training.fit.lr_scale, []

        def interrupted(*arguments):
            steps.append(None)
            if (rank, len(steps)) == (1, until):
                workers._stop()
            return lr_scale(*arguments)

        cat.training.fit.lr_scale = interrupted
        try:
            training.train("copying", "k", setting, device="cpu", parallel_runs=2)
        except workers.Stopped:
            return "stopped"
        return len(steps)

    assert in_processes(2, train) == [40, 40]
    expected = digests(Path("runs"))
    summary = read_json(Path("runs/copying/k/summary.json"))
    assert summary["device"] == f"2 x {describe(CPU)}, PyTorch {version('torch').partition('+')[0]}"
    assert (
        summary["model"]["config"]["norm"] == "layer"
    )  # defaults are stored too, so that weights stay loadable if a default changes
    assert [p.name for p in Path("checkpoints/copying/k").glob("*.safetensors")] != []
    for path in [*Path("runs/copying/k").iterdir(), *Path("checkpoints/copying/k").iterdir()]:
        path.unlink()
    assert in_processes(2, lambda rank: train(rank, until=27)) == ["stopped", "stopped"]
    assert digests(Path("runs")) == {}
    assert in_processes(2, train) == [13, 13]
    assert digests(Path("runs")) == expected


@pytest.mark.parametrize(
    ("name", "rank", "message"), [("cuda:1", 0, "is one GPU for several processes"), ("cuda", 2, "there are 2 GPUs")]
)
def test_each_process_has_its_own_gpu(name, rank, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda", 1) == torch.device("cuda", 1)
    assert own_device("cuda:1", None) == torch.device("cuda", 1)
    assert own_device("cpu", 5) == CPU
    with pytest.raises(ParamsError, match=message):
        own_device(name, rank)
