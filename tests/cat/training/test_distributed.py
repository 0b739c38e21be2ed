"""One run on several processes is the run of one, up to rounding: the same on all, whatever happens to one of them."""

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
from tests.pipeline.runtime.test_checkpoints import CPU, PROTOCOL, TrainingConfig, build, digests, successor


def together(count, function):
    """What `function(rank)` returns in each of `count` processes started as torchrun starts them; else its exit code."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    said = context.SimpleQueue()

    def serve(rank):
        os.environ |= {**about, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
        said.put((rank, function(rank)))

    workers = [context.Process(target=serve, args=(rank,), daemon=True) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    ended = {rank: worker.exitcode for rank, worker in enumerate(workers)}
    while not said.empty():
        rank, result = said.get()
        ended[rank] = result
    return [ended[rank] for rank in range(count)]


def run(group=SINGLE_PROCESS, *, batch=16, **options):
    """What became of a run: its weights as a digest."""
    schedule = TrainingConfig(steps=400, batch=batch, learning_rates=[0.03])
    options = {"protocol": PROTOCOL, "learning_rate": 0.03, "seed": 2, "stop_early": True, **options}
    run = fit(build(), successor(50, 0), successor(17, 1), training_config=schedule, group=group, **options)
    weights = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in run.model.state_dict().values()))
    return weights.hexdigest(), run.steps, run.stop, run.micro_batch, [vars(row) for row in run.history]


def in_a_group(rank):
    with process_group(CPU) as group:
        assert (group.rank, group.broadcast(lambda: rank)) == (rank, 0)
        return run(group, batch=17)


def assert_close(curve, expected):
    """To 1e-4, which is float32 after a few hundred steps."""
    for row, other in zip(curve, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_come_to_the_run_of_one(count):
    """Batches of 17, 17 examples to validate on, answers that are not as many in each: nothing can be divided evenly."""
    first, *others = together(count, in_a_group)
    assert others == [first] * (count - 1)
    _, steps, stop, micro_batch, curve = run(batch=17)
    assert first[1:4] == (steps, stop, micro_batch) == (steps, "accuracy", None)
    assert_close(first[4], curve)


class Part(ProcessGroup):
    """One of several processes, which hears nothing of the others."""

    def add(self, tensor):
        return tensor

    def largest(self, number):
        return number

    def first(self, function):
        return function()


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_gradients_of_the_shares_add_up_to_that_of_the_batch(size, micro_batch):
    batch, model = successor(17, 0).rows(slice(None)), build().double()
    loss, _ = backward(model, batch)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    losses = [backward(model, batch, micro_batch=micro_batch, group=Part(rank, size))[0] for rank in range(size)]
    torch.testing.assert_close(sum(losses), loss)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_rows_and_nearly_alike(size):
    rows = list(range(17))
    shares = [rows[Part(rank, size).local_slice(17)] for rank in range(size)]
    assert list(chain(*shares)) == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_memory_that_one_process_lacks_is_spared_by_all():
    answers = SequenceModel.logits_at

    def short_of_memory(rank):
        def limited(self, tokens, at):
            if rank == 1 and len(tokens) > 3 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError
            return answers(self, tokens, at)

        SequenceModel.logits_at = limited  # of this process, which ends with it
        return in_a_group(rank)

    first, second = together(2, short_of_memory)
    assert first == second
    assert first[3] == 3  # 9, 5, 3
    assert_close(first[4], run(batch=17)[4])


@pytest.mark.parametrize(("batch", "size"), [(3, 4), (40, 18)])
def test_more_processes_than_examples_are_refused_in_one_line(batch, size):
    words = f"{size} processes are too many for batches of {batch} examples and 17 to validate on; each must have one"
    with pytest.raises(ValueError, match=f"^{words}$"):
        run(Part(0, size), batch=batch)


def test_the_end_of_one_is_the_end_of_the_other():
    def killed(rank):
        rate = cat.training.fit.lr_scale

        def at_the_seventh(step, *about):
            if (rank, step) == (1, 7):
                os.kill(os.getpid(), signal.SIGKILL)
            return rate(step, *about)

        cat.training.fit.lr_scale = at_the_seventh
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the traceback
        return in_a_group(rank)

    assert together(2, killed) == [1, -signal.SIGKILL]


def test_a_cell_goes_on_to_the_same_bits_where_one_process_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    stage("plan")
    stage("generate", "copying")
    about = load_study()
    schedule = about.tasks["copying"].training.model_copy(update={"steps": 20})
    setting = training.CellSetting(about.variants["k"], about.optimizer, schedule, about.seeds, about.precision)

    def train(rank, until=None):
        rate, steps = cat.training.fit.lr_scale, []

        def interrupted(*about):
            steps.append(None)
            if (rank, len(steps)) == (1, until):
                workers._stop()
            return rate(*about)

        cat.training.fit.lr_scale = interrupted
        try:
            training.train("copying", "k", setting, device="cpu", parallel_runs=2)
        except workers.Stopped:
            return "stopped"
        return len(steps)

    assert together(2, train) == [40, 40]
    expected = digests(Path("runs"))
    summary = read_json(Path("runs/copying/k/summary.json"))
    assert summary["device"] == f"2 x {describe(CPU)}, PyTorch {version('torch').partition('+')[0]}"
    assert summary["model"]["config"]["norm"] == "layer"  # a default, so that a weights file needs no other version's
    assert [p.name for p in Path("checkpoints/copying/k").glob("*.safetensors")] != []
    for path in [*Path("runs/copying/k").iterdir(), *Path("checkpoints/copying/k").iterdir()]:
        path.unlink()
    assert together(2, lambda rank: train(rank, until=27)) == ["stopped", "stopped"]
    assert digests(Path("runs")) == {}
    assert together(2, train) == [13, 13]
    assert digests(Path("runs")) == expected


@pytest.mark.parametrize(
    ("name", "number", "words"), [("cuda:1", 0, "is one GPU for several processes"), ("cuda", 2, "there are 2 GPUs here")]
)
def test_processes_have_a_gpu_each(name, number, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda", 1) == torch.device("cuda", 1)
    assert own_device("cuda:1", None) == torch.device("cuda", 1)
    assert own_device("cpu", 5) == CPU
    with pytest.raises(ParamsError, match=words):
        own_device(name, number)
