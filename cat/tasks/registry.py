"""All tasks, found by their files: `kind: recall` is cat/tasks/recall.py, `kind: my_package.my_task` is my_package/my_task.py.

A task is a configuration that draws its examples in NumPy. The examples are a pure function of the configuration, the length, the
count and the generator, the same on every machine.

The file of a task defines one subclass of `Task`, whose `kind` is the name of the file or, in another package, the import path.
Other files in cat/tasks/ define none.
"""

from __future__ import annotations

import functools
import inspect
import operator
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

import cat.tasks
from cat.seeding import generator
from cat.tasks.base import IGNORE, Examples, Task, Windows

__all__ = ["IGNORE", "KINDS", "AnyTask", "Examples", "Task", "Windows", "generator", "module_of", "task_class"]


def module_of(kind: str) -> str:
    """The module that defines the tasks of a kind."""
    return kind if "." in kind else f"cat.tasks.{kind}"


def task_class(kind: str) -> type[Task]:
    """The class of a kind. Raises ValueError if its file cannot be imported or does not define it."""
    try:
        module = import_module(module_of(kind))
    except Exception as error:  # whatever the code of somebody's own file raises
        raise ValueError(f"kind = {kind}: cannot be imported ({type(error).__name__}: {error})") from None
    found = _own_task(module, kind)
    if found is None:
        raise ValueError(f"kind = {kind}: {module.__name__} defines no subclass of Task with `vocabulary` and `examples`")
    return found


def _own_task(module: ModuleType, kind: str) -> type[Task] | None:
    """The task that a module defines. Raises ValueError if it defines several, or one of another kind."""
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    tasks = [value for value in own if issubclass(value, Task) and not inspect.isabstract(value)]
    if len(tasks) > 1:
        raise ValueError(f"kind = {kind}: {module.__name__} defines {len(tasks)} tasks. Fix: one file per task")
    if tasks and get_args(tasks[0].model_fields["kind"].annotation) != (kind,):
        raise ValueError(f'kind = {kind}: {tasks[0].__name__} in {module.__name__} needs the field kind: Literal["{kind}"]')
    return tasks[0] if tasks else None


def _kinds() -> dict[str, type[Task]]:
    names = [module.name for module in pkgutil.iter_modules(cat.tasks.__path__) if module.name != "registry"]
    found = {name: _own_task(import_module(module_of(name)), name) for name in names}
    return {name: task for name, task in found.items() if task is not None}


def _also_own_kinds(raw: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validate a kind with a dot, which is not in the union, by its own class."""
    kind = raw.get("kind") if isinstance(raw, dict) else getattr(raw, "kind", None)
    if isinstance(kind, str) and "." in kind:
        return task_class(kind).model_validate(raw)
    return handler(raw)


def _add_own_kinds(schema: dict[str, Any]) -> None:
    union = dict(schema)
    own = {"type": "object", "properties": {"kind": {"type": "string", "pattern": "\\."}}, "required": ["kind"]}
    schema.clear()
    schema["anyOf"] = [union, own]


KINDS = _kinds()
"""The tasks in cat/tasks/: kind -> class."""

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[
        functools.reduce(operator.or_, KINDS.values()),
        Field(discriminator="kind", json_schema_extra=_add_own_kinds),
        WrapValidator(_also_own_kinds),
    ]
    """Any task; `kind` selects the class."""
