"""The texts of MLflow's pages: links and descriptions, and the tags that the links search for."""

from __future__ import annotations

import json
from urllib.parse import quote

from pipeline.config.errors import shorten
from pipeline.config.outputs import REPORT_EXPERIMENT
from pipeline.config.study import Study
from pipeline.reporting.labels import task_label
from pipeline.tracking.records import Record

KEY_TAG, CONTEXT_TAG, FOLDER_TAG = "cat.key", "cat.context", "cat.folder"
"""Tags: the record's key, the DVC experiment, and the folder that logged the run."""
NOTE_TAG = "mlflow.note.content"
"""MLflow's tag for the description of a run or an experiment."""
WORKSPACE = "workspace"
"""The context of a run outside DVC experiments."""
NOTE_LENGTH = 8000
"""Characters that MLflow keeps of a tag."""
UNQUOTED = ",.'="
"""Characters that MLflow's addresses keep as they are."""


class Pages:
    """Descriptions of experiments and runs; figures link to runs, and runs link to figures."""

    def __init__(self, study: Study, experiment_ids: dict[str, str], context: str):
        self.study, self.experiment_ids = study, experiment_ids
        self.current = f"tags.current = 'yes' and {context_filter(context)}"
        self.report_id = ""
        """The id of the report's run; set when it is known."""

    def experiment_note(self, experiment: str) -> str:
        """Describe an experiment, with links to useful views of its runs."""
        if experiment == REPORT_EXPERIMENT:
            return "The reports: figures, tables, verdicts. The tag `current` is yes for the report of the present files."
        from pipeline.storage.tables import PRIMARY

        goal = self.study.tasks[experiment].data.goal
        metric = f"{PRIMARY[goal]}_{max(self.study.evaluate.multiples):g}x"
        order = f"&orderByKey=metrics.%60{metric}%60&orderByAsc={'false' if goal == 'accuracy' else 'true'}"
        variants, seeds = (f"{self.current} and tags.kind = '{kind}'" for kind in ("variant", "seed"))
        views = (
            (f"variants, best first by `{metric}`", variants, order),
            (f"variants, chart of `test/{PRIMARY[goal]}` against length", variants, "&compareRunsMode=CHART"),
            ("seeds, best first", seeds, order),
            ("runs of older studies", "tags.current = 'no'", ""),
            ("runs of DVC experiments", f"tags.{CONTEXT_TAG} != '{WORKSPACE}'", ""),
        )
        links = "\n".join(f"* [{text}]({self._search_link([experiment], search)}{options})" for text, search, options in views)
        return (
            f"Task `{experiment}`: {task_label(self.study, experiment)}. Each variant has a run with means over its seeds,"
            f" which contains a run per seed.\n\n{links}\n\n"
            "A metric `test/...` has the evaluation length as its step; `..._sd` is the standard deviation over seeds."
        )

    def run_note(self, record: Record, run_id: str) -> str:
        """Describe a run, with links to its figures or, for the report, to the runs in each figure."""
        parts = [record.note]
        if record.kind == "report":
            tasks = [name for name in self.experiment_ids if name != REPORT_EXPERIMENT]
            searches = {figure: f"tags.`figure.{figure}` = 'yes' and {self.current}" for figure in record.figures}
            links = [f"[{figure}]({self._search_link(tasks, search)})" for figure, search in searches.items()]
            # The verdicts last, because statements of any length may be cut.
            parts = ["Report, figures and tables are under Artifacts.", f"The runs in a figure: {', '.join(links)}.", record.note]
        if record.kind == "seed":
            parts.append(f'```python\nfrom pipeline.tracking.store import load_run\n\nmodel = load_run("{run_id}")\n```')
        if record.kind != "report":
            figures = ", ".join(f"[{figure}]({self._artifact_link(f'figures/{figure}.svg')})" for figure in record.figures)
            parts.append(f"Figures that show it: {figures or 'none'}; [the report]({self._artifact_link('report.html')}).")
        if "dvc.md5" in record.tags:
            parts.append(
                f"`git log -S {record.tags['dvc.md5']} -- dvc.lock` finds the commits whose dvc.lock has this result of the stage"
                f" `{record.tags['dvc.stage']}`."
            )
        return shorten("\n\n".join(parts), NOTE_LENGTH)

    def _search_link(self, experiments: list[str], search: str) -> str:
        ids = [self.experiment_ids[name] for name in experiments]
        page = f"#/experiments/{ids[0]}/runs?workflowType=machine_learning"
        if len(ids) > 1:
            page = f"#/compare-experiments/s?experiments={quote(json.dumps(ids, separators=(',', ':')), safe=UNQUOTED)}"
        return f"{page}&searchFilter={quote(search, safe=UNQUOTED)}"

    def _artifact_link(self, path: str) -> str:
        return f"#/experiments/{self.experiment_ids[REPORT_EXPERIMENT]}/runs/{self.report_id}/artifacts/{path}"


def context_filter(name: str) -> str:
    """Write the search filter for the runs of a DVC experiment; an empty name means the workspace."""
    return f"tags.{CONTEXT_TAG} = '{context_tag(name)}'"


def context_tag(name: str) -> str:
    """Write a DVC experiment's name without quotes, because MLflow's filters cannot escape them."""
    return quote(name) or WORKSPACE
