"""`python -m pipeline --help`: two sections with one line per command."""

import re

from click.testing import CliRunner

from pipeline.cli import main


def test_the_help_lists_every_command_in_its_section():
    output = CliRunner().invoke(main, ["--help"]).stdout
    sections = output.partition("Stages:")[2].partition("Tools:")
    stages, tools = (re.findall(r"^  ([\w-]+) .*[^.][.]$", section, flags=re.MULTILINE) for section in sections[::2])
    assert stages == ["plan", "generate", "train", "evaluate", "judge", "render", "report", "track"]
    assert tools == ["validate", "run", "show", "diff", "add-variant", "profile", "sample", "update-readme"]
    assert {*stages, *tools} == main.commands.keys()
