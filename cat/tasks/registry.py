"""The union of all tasks.

A task is a configuration that draws its examples in NumPy. The examples are a pure function of the configuration, the length, the
count and the generator, the same on every machine.
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
"""Any task; `kind` selects the class."""
