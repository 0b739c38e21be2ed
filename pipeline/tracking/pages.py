"""Links and descriptions in the MLflow pages."""

from __future__ import annotations

import json
from urllib.parse import quote

from pipeline.config.study import Study
from pipeline.tracking.records import STUDY, Record

WORKSPACE = "workspace"
"""The context of a run of no experiment of DVC's."""
_KEY, _CONTEXT, _FOLDER = "cat.key", "cat.evaluation.by_position", "cat.folder"
QUERY = ",.'="
"""What stays as it is in the query of an address."""


class Pages:
    """Addresses within MLflow's pages, and the notes that link figures to runs and runs to figures."""

    def __init__(self, study: Study, experiments: dict[str, str], context: str):
        self.study, self.experiments = study, experiments
        self.here = f"tags.current = 'yes' and {_in_context(context)}"
        self.report = ""
        """The run of the report."""

    def about(self, experiment: str) -> str:
        """What an experiment is, and its runs as one would look for them."""
        if experiment == STUDY:
            return "The reports: figures, tables, verdicts. The one whose tag `current` is yes is that of the files."
        from pipeline.storage.results import PRIMARY

        goal = self.study.tasks[experiment].data.goal
        best = f"{PRIMARY[goal]}_{max(self.study.evaluate.multiples):g}x"
        by = f"&orderByKey=metrics.%60{best}%60&orderByAsc={'false' if goal == 'accuracy' else 'true'}"
        variants, seeds = (f"{self.here} and tags.kind = '{kind}'" for kind in ("variant", "seed"))
        listed = (
            (f"the variants, the best first, by `{best}`", variants, by),
            (f"their `test/{PRIMARY[goal]}` against length, as a chart", variants, "&compareRunsMode=CHART"),
            ("every seed", seeds, by),
            ("what older studies found", "tags.current = 'no'", ""),
            ("what experiments of DVC found", f"tags.{_CONTEXT} != '{WORKSPACE}'", ""),
        )
        links = "\n".join(f"* [{words}]({self._search([experiment], wanted)}{more})" for words, wanted, more in listed)
        return (
            f"A run a variant, with means over its seeds, whose runs are within it.\n\n{links}\n\n"
            "A metric `test/...` has the evaluation length as its step; `..._sd` is the standard deviation over seeds."
        )

    def note(self, record: Record, run_id: str) -> str:
        """What is said of the run, and where to go from it."""
        parts = [record.note]
        if record.kind == "report":
            tasks = [name for name in self.experiments if name != STUDY]
            wanted = {figure: f"tags.`figure.{figure}` = 'yes' and {self.here}" for figure in record.figures}
            links = [f"[{figure}]({self._search(tasks, runs_of_it)})" for figure, runs_of_it in wanted.items()]
            parts = ["Report, figures and tables are under Artifacts.", record.note, f"The runs in a figure: {', '.join(links)}."]
        if record.kind == "seed":
            parts.append(f'```python\nfrom pipeline.tracking.store import load_run\n\nmodel = load_run("{run_id}")\n```')
        if record.kind != "report":
            shown = ", ".join(f"[{figure}]({self._artifact(f'figures/{figure}.png')})" for figure in record.figures)
            parts.append(f"Figures that it is in: {shown or 'none'}; [the report]({self._artifact('report.html')}).")
        if "dvc.md5" in record.tags:
            parts.append(
                f"`git log -S {record.tags['dvc.md5']} -- dvc.lock` finds the commits whose dvc.lock has this result, as that of"
                f" the stage `{record.tags['dvc.stage']}`."
            )
        return "\n\n".join(parts)

    def _search(self, experiments: list[str], wanted: str) -> str:
        ids = [self.experiments[name] for name in experiments]
        page = f"#/experiments/{ids[0]}/runs?workflowType=machine_learning"
        if len(ids) > 1:
            page = f"#/compare-experiments/s?experiments={quote(json.dumps(ids, separators=(',', ':')), safe=QUERY)}"
        return f"{page}&searchFilter={quote(wanted, safe=QUERY)}"

    def _artifact(self, path: str) -> str:
        return f"#/experiments/{self.experiments[STUDY]}/runs/{self.report}/artifacts/{path}"


def _in_context(name: str) -> str:
    """The runs of one of DVC's experiments, or of none."""
    return f"tags.{_CONTEXT} = '{_context(name)}'"


def _context(name: str) -> str:
    """How a tag names one of DVC's experiments: without quotes, which MLflow's filters cannot escape."""
    return quote(name) or WORKSPACE
