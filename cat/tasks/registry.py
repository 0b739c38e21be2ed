"""The tasks: a configuration each, and from it, a length, a count and a generator the examples, in NumPy.

The same on every machine, and every question has exactly one answer.
"""

from typing import Annotated

from pydantic import Field

from cat.seeding import generator
from cat.tasks.base import IGNORE, Examples, Task, Windows
from cat.tasks.copying import Copying
from cat.tasks.recall import Recall
from cat.tasks.text import Text

__all__ = ["IGNORE", "AnyTask", "Copying", "Examples", "Recall", "Task", "Text", "Windows", "generator"]

AnyTask = Annotated[Recall | Copying | Text, Field(discriminator="kind")]
"""Every kind of task there is."""
