"""`watch` prints the files of cells in training."""

import io

import pytest
from rich.console import Console

from pipeline.commands import watch as module
from pipeline.commands.watch import watch
from pipeline.storage.live import LiveWriter

ROW = {
    "learning_rate": 0.01,
    "seed": 1,
    "step": 50,
    "schedule": 0.005,
    "train_loss": 1.5,
    "valid_accuracy": 0.25,
    "grad_norm": 2.0,
}
LINE = (
    "ar qk, seed 1, learning rate 0.01: {}, 50 of 100 steps, "
    "loss 1.500, accuracy 0.250, gradient norm 2.00, learning rate now 0.005"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def printed(**options):
    output = io.StringIO()
    watch(console=Console(file=output, width=20), **options)
    return output.getvalue().splitlines()


def test_the_present_state_is_printed_once():
    assert printed(once=True) == ["no run is in training, and none was"]
    writer = LiveWriter("ar", "qk", 100)
    writer.write(ROW)
    assert printed(once=True) == [LINE.format("training")]
    writer.lock.release()  # as when the process is killed
    assert printed(once=True) == [LINE.format("killed")]
    writer.end("trained")
    assert printed(once=True) == [LINE.format("trained")]


def test_without_a_terminal_each_change_is_one_line(monkeypatch):
    LiveWriter("ar", "old", 100).end("trained")
    writer, output = LiveWriter("ar", "qk", 100), io.StringIO()
    changes = iter([lambda: None, lambda: writer.write(ROW), lambda: None, lambda: writer.end("trained")])

    def sleep(seconds):
        try:
            next(changes)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch(console=Console(file=output))
    assert output.getvalue().splitlines() == [LINE.format("training"), LINE.format("trained")]


def test_a_terminal_shows_one_table():
    writer = LiveWriter("ar", "qk", 100)
    writer.write(ROW)
    writer.end("trained")
    output = io.StringIO()
    Console(file=output, width=80).print(module._table(module._lines({}, running=False)))
    row = ["ar", "qk", "1", "0.01", "trained", "50", "of", "100", "1.500", "0.250", "2.00", "0.005"]
    assert output.getvalue().splitlines()[1].split() == row
