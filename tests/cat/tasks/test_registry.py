"""Tasks are found by their files, in cat/tasks/ and in other packages."""

import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

import cat.tasks
from cat.tasks import registry
from cat.tasks.recall import Recall
from cat.tasks.registry import KINDS, AnyTask, module_of, task_class

TASK = """
from typing import Literal
from cat.tasks.base import Examples, Task

class {name}(Task):
    kind: Literal["{kind}"]
    size: int

    @property
    def vocabulary(self) -> int:
        return self.size

    def examples(self, split, length, count, generator) -> Examples:
        raise NotImplementedError
"""
SETTINGS = {"length": 8, "multiples": [1, 2], "train_examples": 7, "valid_examples": 5, "test_examples": 3, "size": 11}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes own_tasks/<name>.py, which can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name, text):
        path = tmp_path / "own_tasks" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_kind_of_a_task_is_the_name_of_its_file():
    assert KINDS.keys() >= {"recall", "copying", "text"}
    for kind, task in KINDS.items():
        assert task.__module__ == module_of(kind) == f"cat.tasks.{kind}"
        assert get_args(task.model_fields["kind"].annotation) == (kind,)
        assert task_class(kind) is task
    others = {path.stem for path in Path(registry.__file__).parent.glob("*.py")} - KINDS.keys()
    assert others >= {"base", "corpus", "encoded", "local", "ngrams", "registry", "tokenizer", "witten_bell"}


def test_a_new_file_in_the_folder_is_a_new_task(tmp_path, monkeypatch):
    monkeypatch.setattr(cat.tasks, "__path__", [*cat.tasks.__path__, str(tmp_path)])
    (tmp_path / "parity.py").write_text(TASK.format(name="Parity", kind="parity"))
    (tmp_path / "helper.py").write_text("from cat.tasks.recall import Recall\n")
    try:
        assert registry._kinds().keys() - KINDS.keys() == {"parity"}
    finally:
        for name in ("cat.tasks.parity", "cat.tasks.helper"):
            sys.modules.pop(name, None)


def test_a_task_of_another_package_is_named_by_its_import_path(own):
    own("parity", TASK.format(name="Parity", kind="own_tasks.parity"))
    task = TypeAdapter(AnyTask).validate_python({"kind": "own_tasks.parity", **SETTINGS})
    assert type(task) is task_class("own_tasks.parity")
    assert (task.vocabulary, task.lengths, task.label) == (11, (8, 16), "parity")
    again = TypeAdapter(AnyTask).validate_python(task.model_dump(mode="json"))
    assert again == task
    assert TypeAdapter(AnyTask).validate_python(task) is task


def test_an_error_in_the_settings_of_an_own_task_names_the_key(own):
    own("parity", TASK.format(name="Parity", kind="own_tasks.parity"))
    with pytest.raises(ValidationError) as error:
        TypeAdapter(AnyTask).validate_python({"kind": "own_tasks.parity", **SETTINGS, "size": "eleven"})
    assert [detail["type"] for detail in error.value.errors()] == ["int_type"]
    assert error.value.errors()[0]["loc"][-1] == "size"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "own_tasks.task defines no subclass of Task with `vocabulary` and `examples`"),
        ("from cat.tasks.recall import Recall\n", "defines no subclass of Task"),
        (TASK.format(name="One", kind="one"), 'One in own_tasks.task needs the field kind: Literal["own_tasks.task"]'),
        (TASK.format(name="One", kind="own_tasks.task") + TASK.format(name="Two", kind="own_tasks.task"), "defines 2 tasks"),
        ("import absent_module\n", "cannot be imported (ModuleNotFoundError: No module named 'absent_module')"),
        ("1 / 0\n", "cannot be imported (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_file_that_is_not_one_task_is_an_error(text, message, own):
    own("task", text)
    with pytest.raises(ValueError, match="kind = own_tasks") as error:
        task_class("own_tasks.task")
    assert message in str(error.value)
    with pytest.raises(ValidationError, match="kind = own_tasks"):
        TypeAdapter(AnyTask).validate_python({"kind": "own_tasks.task", **SETTINGS})


def test_a_task_needs_no_name_of_its_own():
    settings = {"ngram": 1, "keys": 9, "values": 9, "filler": 1, "pairs": 1, "queries": "all", "query_gap": "uniform"}
    sizes = {key: value for key, value in SETTINGS.items() if key != "size"}
    task = TypeAdapter(AnyTask).validate_python({"kind": "recall", **sizes, **settings})
    assert type(task) is Recall
    assert task.label == "associative recall"
    assert task.model_copy(update={"ngram": 2}).label == "2-gram recall"
