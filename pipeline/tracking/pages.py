"""The texts of MLflow's pages: addresses, descriptions and saved views, and the tags that they search for.

MLflow opens an experiment on its overview of language-model traces unless the address names the workflow `machine_learning`. No
setting of the server changes this, so every address here has it, and the experiment of the report lists those of all tasks.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from cat.tasks.base import Task
from pipeline.config.errors import shorten
from pipeline.config.grid import shown_tasks
from pipeline.config.outputs import REPORT_EXPERIMENT
from pipeline.config.study import Study
from pipeline.reporting.labels import task_label, with_slug
from pipeline.tracking.records import BY_LENGTH, Record

KEY_TAG, CONTEXT_TAG, FOLDER_TAG = "cat.key", "cat.context", "cat.folder"
"""Tags: the record's key, the DVC experiment, and the folder that logged the run."""
NOTE_TAG = "mlflow.note.content"
"""MLflow's tag for the description of a run or an experiment."""
VIEW_TAG = "mlflow.sharedViewState."
"""MLflow's tag of an experiment for a saved view; the address and the tag name its key."""
VIEW_PREFIX = "cat-"
"""Begins the keys of our views; others are made by hand."""
WORKSPACE = "workspace"
"""The context of a run outside DVC experiments."""
LIVE = "live"
"""The kind of a run that shows a training in progress; it goes when the final runs are logged."""
NOTE_LENGTH = 8000
"""Characters that MLflow keeps of a tag."""


class View(NamedTuple):
    """A saved view of the runs of a task: which runs, in which order, with which columns."""

    key: str
    name: str
    search: str
    order: str = "attributes.start_time"
    ascending: bool = False
    columns: tuple[str, ...] = ()
    chart: bool = False
    group_by: str | None = None
    """A parameter; runs with the same value become one row with their mean."""

    def content(self, created: int) -> str:
        """Write the view for MLflow, with the time of its creation in milliseconds."""
        state: dict[str, Any] = {
            "searchFilter": self.search,
            "orderByKey": self.order,
            "orderByAsc": self.ascending,
            "selectedColumns": [*self.columns, "attributes.`Source`"],
            # By default only the first ten runs are drawn.
            "runsHiddenMode": "SHOW_ALL" if self.chart else "FIRST_10_RUNS",
        }
        if self.group_by:
            keys = [{"mode": "param", "groupByData": self.group_by}]
            state["groupBy"] = {"aggregateFunction": "average", "groupByKeys": keys}
        # MLflow before 3.17 reads the state itself, later versions read it from inside the named view.
        return json.dumps({"name": self.name, "createdAt": created, "updatedAt": created, "state": json.dumps(state), **state})


class Pages:
    """Descriptions of experiments and runs; figures link to runs, and runs link to figures."""

    def __init__(self, study: Study, experiment_ids: dict[str, str], context: str):
        self.study, self.experiment_ids = study, experiment_ids
        self.tasks = [name for name in experiment_ids if name != REPORT_EXPERIMENT]
        self.context = context_filter(context)
        self.current = f"tags.current = 'yes' and {self.context}"
        self.report_id = ""
        """The id of the report's run; set when it is known."""

    def view_tags(self, experiment: str, created: int) -> dict[str, str]:
        """Return the tags of an experiment that hold its saved views."""
        views = [] if experiment == REPORT_EXPERIMENT else self.views(experiment)
        return {f"{VIEW_TAG}{VIEW_PREFIX}{view.key}": view.content(created) for view in views}

    def views(self, task: str) -> list[View]:
        """List the saved views of a task."""
        return list(self._views(task))

    def _views(self, task: str) -> Iterator[View]:
        from pipeline.storage.tables import PRIMARY

        goal = self.study.tasks[task].data.goal
        name, multiples = PRIMARY[goal], sorted(self.study.evaluate.multiples)
        metric = f"{name}_{multiples[-1]:g}x"
        columns = tuple(f"metrics.`{name}_{multiple:g}x`" for multiple in reversed(multiples))
        order: dict[str, Any] = {"order": f"metrics.`{metric}`", "ascending": goal != "accuracy"}
        variants, seeds = (f"{self.current} and tags.kind = '{kind}'" for kind in ("variant", "seed"))
        spread = (columns[0], f"metrics.`{metric}_sd`", *columns[1:])
        yield View("best", f"variants, best first by `{metric}`", variants, columns=spread, **order)
        for ablation in self._ablations(task):
            shown = f"{variants} and tags.`figure.{ablation}` = 'yes'"
            title = f"chart of `test/{name}{BY_LENGTH}`: variants of {ablation}"
            yield View(f"chart-{ablation}", title, shown, columns=columns, chart=True, **order)
        yield View("seeds", "seeds, best first", seeds, columns=("params.`seed`", *columns), **order)
        yield View("by-variant", "seeds, grouped by variant", seeds, columns=columns, group_by="variant", **order)
        training = (
            "metrics.`train/loss`",
            "metrics.`valid/accuracy`",
            "metrics.`train/grad_norm`",
            "metrics.`train/learning_rate`",
        )
        yield View("training", "runs in training", f"tags.kind = '{LIVE}'", columns=training, chart=True)
        yield View("older", "runs of older studies", "tags.current = 'no'", columns=columns)
        yield View("experiments", "runs of DVC experiments", f"tags.{CONTEXT_TAG} != '{WORKSPACE}'", columns=columns)

    def _ablations(self, task: str) -> list[str]:
        return [name for name, ablation in self.study.ablations.items() if task in shown_tasks(self.study, ablation)]

    def experiment_note(self, experiment: str) -> str:
        """Describe an experiment, with links to useful views of its runs."""
        if experiment == REPORT_EXPERIMENT:
            return self._index()
        from pipeline.storage.tables import PRIMARY

        data = self.study.tasks[experiment].data
        name = PRIMARY[data.goal]
        links = "\n".join(f"* [{view.name}]({self.view_address(experiment, view)})" for view in self.views(experiment))
        questions = "\n".join(f"* {self.study.ablations[name].question}" for name in self._ablations(experiment))
        lengths = ", ".join(map(str, data.lengths))
        note = (
            f"Task `{experiment}`: {task_label(self.study, experiment)}.\n\n{_about(data)}\n\n"
            f"Trained at length {data.length}, tested at {lengths}.\n\n{links}\n\n"
            f"Each variant has a run with means over its seeds, which contains a run per seed. `{name}_2x` is the score at twice"
            f" the training length, `test/{name}` at the training length, and the step of `test/{name}{BY_LENGTH}` is the length."
            f" `..._sd` is the standard deviation over seeds.\n\n"
            f"Questions:\n\n{questions}"
        )
        return shorten(note, NOTE_LENGTH)

    def _index(self) -> str:
        wanted = {"best": "best variants", "seeds": "seeds", "training": "runs in training"}
        tasks = []
        for task in self.tasks:
            views = {view.key: view for view in self.views(task)}
            chart = next(key for key in views if key.startswith("chart-"))
            named = {**wanted, chart: "chart by length"}
            links = ", ".join(f"[{name}]({self.view_address(task, views[key])})" for key, name in named.items())
            tasks.append(f"* {with_slug(task_label(self.study, task), task)}: {links}")
        note = (
            "All tasks of the study:\n\n" + "\n".join(tasks) + "\n\nThe runs of this page are the reports: figures, tables,"
            " verdicts. The tag `current` is yes for the report of the present files."
        )
        return shorten(note, NOTE_LENGTH)

    def view_address(self, experiment: str, view: View) -> str:
        """Write the address of a saved view."""
        options = {"viewStateShareKey": f"{VIEW_PREFIX}{view.key}", **({"compareRunsMode": "CHART"} if view.chart else {})}
        return runs_address(self.experiment_ids[experiment], **options)

    def run_note(self, record: Record, run_id: str) -> str:
        """Describe a run, with its figures or, for the report, with links to the runs in each figure."""
        parts = [record.note]
        if record.kind == "report":
            searches = {figure: f"tags.`figure.{figure}` = 'yes' and {self.current}" for figure in record.figures}
            links = [f"[{figure}]({self._search_address(self.tasks, search)})" for figure, search in searches.items()]
            # The verdicts last, because statements of any length may be cut.
            parts = ["Report, figures and tables are under Artifacts.", f"The runs in a figure: {', '.join(links)}.", record.note]
        if record.kind == "seed":
            parts.append(f'```python\nfrom pipeline.tracking.store import load_run\n\nmodel = load_run("{run_id}")\n```')
        if record.kind != "report":
            figures = ", ".join(f"[{figure}]({self._artifact_address(f'figures/{figure}.svg')})" for figure in record.figures)
            parts.append(f"Figures that show it: {figures or 'none'}; [the report]({self._artifact_address('report.html')}).")
        if "dvc.md5" in record.tags:
            parts.append(
                f"`git log -S {record.tags['dvc.md5']} -- dvc.lock` finds the commits whose dvc.lock has this result of the stage"
                f" `{record.tags['dvc.stage']}`."
            )
        if record.kind == "variant":
            parts += [f"![{figure}]({self._image_address(f'figures/{figure}.svg')})" for figure in record.figures]
        return shorten("\n\n".join(parts), NOTE_LENGTH)

    def _search_address(self, experiments: list[str], search: str) -> str:
        ids = [self.experiment_ids[name] for name in experiments]
        if len(ids) == 1:
            return runs_address(ids[0], searchFilter=search)
        return address("compare-experiments/s", experiments=json.dumps(ids, separators=(",", ":")), searchFilter=search)

    def _artifact_address(self, path: str) -> str:
        return address(f"experiments/{self.experiment_ids[REPORT_EXPERIMENT]}/runs/{self.report_id}/artifacts/{path}")

    def _image_address(self, path: str) -> str:
        return f"get-artifact?{_query(path=path, run_uuid=self.report_id)}"


def _about(task: Task) -> str:
    """Describe a task by the docstring of its file, up to the example."""
    paragraphs = (inspect.getdoc(inspect.getmodule(type(task))) or "").split("\n\n")
    example = next((i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("    ")), 0)
    return "\n\n".join(paragraphs[: example + 1])


def runs_address(experiment_id: str, **options: str) -> str:
    """Write the address of an experiment's page of runs."""
    return address(f"experiments/{experiment_id}/runs", **options)


def address(path: str, **options: str) -> str:
    """Write an address of MLflow's pages that has no character with a meaning in Markdown."""
    return f"#/{quote(path)}?{_query(workflowType='machine_learning', **options)}"


def _query(**options: str) -> str:
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())


def context_filter(name: str) -> str:
    """Write the search filter for the runs of a DVC experiment; an empty name means the workspace."""
    return f"tags.{CONTEXT_TAG} = '{context_tag(name)}'"


def context_tag(name: str) -> str:
    """Write a DVC experiment's name without quotes, because MLflow's filters cannot escape them."""
    return quote(name) or WORKSPACE
