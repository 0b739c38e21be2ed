"""The help has two sections with one line per command; a closed pipe ends a command; imports are quick."""

import gc
import os
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pipeline.cli import main, quick_imports
from tests.helpers.study import ROOT


def test_the_help_lists_every_command_in_its_section():
    output = CliRunner().invoke(main, ["--help"]).stdout
    sections = output.partition("Stages:")[2].partition("Tools:")
    stages, tools = (re.findall(r"^  ([\w-]+) .*[^.][.]$", section, flags=re.MULTILINE) for section in sections[::2])
    assert stages == ["plan", "generate", "train", "evaluate", "judge", "render", "report", "track"]
    assert tools == [
        "validate",
        "run",
        "watch",
        "register",
        "show",
        "diff",
        "add-variant",
        "format",
        "check-mixer",
        "profile",
        "sample",
        "export",
        "update-readme",
    ]
    assert {*stages, *tools} == main.commands.keys()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
@pytest.mark.parametrize("arguments", [["--help"], ["validate"], ["validate", "--help"]])
def test_a_closed_pipe_ends_a_command_that_prints_without_a_message(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_pipe_that_closes_during_a_run_ends_it_without_a_message(monkeypatch, capfd):
    """Not by the signal, since a worker that is killed closes a pipe, too."""

    def write():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("pipeline.stages.render.update_readme", write)
    stdout = os.dup(1)
    try:
        done = CliRunner().invoke(main, ["update-readme"])
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert (done.exit_code, done.output) == (128 + signal.SIGPIPE, "")
    assert capfd.readouterr() == ("", "")


def test_reference_cycles_are_searched_again_after_imports_also_if_one_fails():
    def fail():
        with quick_imports():
            searched.append(gc.isenabled())
            raise ImportError

    searched = [gc.isenabled()]
    with pytest.raises(ImportError):
        fail()
    assert [*searched, gc.isenabled()] == [True, False, True]
