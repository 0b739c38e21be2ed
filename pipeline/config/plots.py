"""The interface of a plot, and the plot of a name. A plot is loaded by its name, so this room imports none of its figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from pipeline.config.errors import nearest
from pipeline.config.grid import shown_cells, shown_tasks, variants_on
from pipeline.config.names import plot_names
from pipeline.config.study import Ablation, Study

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Plot(ABC):
    """One kind of figure: its check of params.yaml, its caption and its drawing.

    A file has one plot, and `plot` in params.yaml is the name of the file. Checking params.yaml imports the file. So it imports
    matplotlib, seaborn, pandas and torch only in the functions that use them.
    """

    takes_x: ClassVar[bool] = False
    """Whether the ablation must name the keys on the axis, `x`."""
    uses_metrics: ClassVar[bool] = False
    """Whether `draw` gets all metrics instead of only the primary one of each task."""
    shows_references: ClassVar[bool] = False
    """Whether the figure shows the reference lines of the ablation."""
    shows_models: ClassVar[bool] = False
    """Whether the figure shows models or single answers, so that its section has no table of scores and no failures."""
    scores_every_rate: ClassVar[bool] = False
    """Whether the figure shows test scores of all learning rates, not only of the chosen one."""
    extra_plots: ClassVar[Mapping[str, str]] = {"length": "lines", "training": "training"}
    """End of the name -> plot of each further figure of the same ablation."""
    rows: ClassVar[str] = (
        "the rows of these variants with the metric accuracy, or bits_per_byte for text; the curves use every length"
    )
    """Which rows of its sources the figure shows, for readers of the report."""

    @property
    @abstractmethod
    def caption(self) -> str:
        """What the figure shows, below it in the report."""

    @abstractmethod
    def draw(self, study: Study, ablation: Ablation, results: pd.DataFrame, references: pd.DataFrame) -> Figure:
        """Draw the figure.

        `results` has the rows of the tasks and variants of the figure, with the columns of `read_results`. `references` has the
        rows of the ablation's reference lines, with the columns of `read_references`.
        """

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        """Yield each problem in words. All names of the ablation exist."""
        yield from ()

    def sources(self, study: Study, ablation: Ablation) -> list[str]:
        """The files with the numbers of the figure."""
        return [f"results/{task}.csv" for task in shown_tasks(study, ablation)]

    def tables(self, study: Study, ablation: Ablation, results: pd.DataFrame) -> Iterator[str]:
        """Yield further tables for the section of the report, in Markdown; `results` has all metrics of the study."""
        yield from ()

    def timed_tables(self, study: Study, ablation: Ablation) -> Iterator[str]:
        """Yield tables of measured times, for the HTML report only: the other files are the same in every run."""
        yield from ()

    @property
    def name(self) -> str:
        """The name in params.yaml."""
        return type(self).__module__.removeprefix("pipeline.figures.")

    def problems(self, study: Study, ablation: Ablation) -> Iterator[str]:
        """Yield one line per problem of an ablation with this plot."""
        if bool(ablation.x_keys) != self.takes_x:
            yield f"plot = {self.name} " + ("needs x, the key on its axis" if self.takes_x else "takes no x")
            return
        if ablation.reference_lines:
            yield from self._check_references(study, ablation)
        yield from self.check(study, ablation)

    def _check_references(self, study: Study, ablation: Ablation) -> Iterator[str]:
        plots = (self, *map(load_plot, self.extra_plots.values()))
        if not any(plot.shows_references for plot in plots):
            yield f"plot = {self.name} shows no reference_lines"
            return
        # Known to any task of the study: an ablation keeps its lines when a task is taken from its list.
        known = list(dict.fromkeys(name for section in study.tasks.values() for name in section.data.reference_names))
        for name in ablation.reference_lines:
            if name not in known:
                problem = f"known are {', '.join(known)}" if known else "they state none"
                yield f"reference_lines: the tasks state no {name!r}; {problem}" + nearest(name, known)


def scored_at_every_rate(study: Study, task: str) -> list[str]:
    """The variants on `task` of which a figure shows test scores of all learning rates."""
    ablations = [ablation for ablation in study.ablations.values() if load_plot(ablation.plot).scores_every_rate]
    shown = {variant for ablation in ablations for at, variant in shown_cells(study, ablation) if at == task}
    return [variant for variant in variants_on(study, task) if variant in shown]


def load_plot(name: str) -> Plot:
    """The plot of pipeline/figures/<name>.py. A name with a dot is that of a module in the working folder.

    Raises ValueError if there is no such file, if it cannot be imported, or if it does not define exactly one plot.
    """
    if "." not in name and name not in (known := plot_names()):
        problem = f"must be one of {', '.join(known)}, or a module of your own such as my_package.my_plot"
        raise ValueError(problem + nearest(name, known))
    if "." not in name:
        return _only_plot(import_module(f"pipeline.figures.{name}"))
    file = Path(f"{name.replace('.', '/')}.py")
    if not file.is_file():
        raise ValueError(f"the file {file} does not exist")
    try:
        module = import_module(name)
    except Exception as error:  # the file is the user's: any error may happen while it is imported
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    return _only_plot(module)


def _only_plot(module: ModuleType) -> Plot:
    own_classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    plots = [value for value in own_classes if issubclass(value, Plot)]
    if len(plots) != 1:
        raise ValueError(f"{module.__name__} must define exactly one plot, found {len(plots)}")
    if lacking := plots[0].__abstractmethods__:
        raise ValueError(f"{module.__name__}: the class {plots[0].__name__} lacks {' and '.join(sorted(lacking))}")
    plot: Plot = plots[0]()
    return plot
