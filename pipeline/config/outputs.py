"""Names of what the stages write, and the names of params.yaml that would clash with them. Importing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.plots import Plot, load_plot
from pipeline.config.study import Ablation, Study

CLAIMS, GLOSSARY, COST = "claims", "glossary", "cost"
"""Sections of the report that belong to no ablation. Each is an anchor beside those of the ablations; COST is also a figure."""
COST_BY_PARAMETERS = "cost_by_parameters"
COST_BY_TIME = "cost_by_time"
"""The figure of cost that only report.html shows."""
REPORT_EXPERIMENT = "study"
"""The MLflow experiment of the report's run, beside one experiment per task."""
STAMP_NAME = "stamp"
"""The file in mlartifacts/ beside one folder per experiment."""


def figure_plots(name: str, ablation: Ablation) -> dict[str, Plot]:
    """File name -> plot of each figure of an ablation: its own, and the further ones of its plot."""
    plot = load_plot(ablation.plot)
    return {name: plot, **{f"{name}_{end}": load_plot(extra) for end, extra in plot.extra_plots.items()}}


def clashes(study: Study) -> Iterator[str]:
    """Yield one line per name that the stages also use for something else."""
    sections = {
        CLAIMS: "the report's section of claims",
        GLOSSARY: "the report's section of tasks and variants",
        COST: "the report's section and figure of cost",
        COST_BY_PARAMETERS: "the report's figure of cost by parameters",
        COST_BY_TIME: "the report's figure of cost by time",
    }
    for name, ablation in study.ablations.items():
        for file in figure_plots(name, ablation).keys() - {name}:
            sections.setdefault(file, f"a figure of ablation {name!r}")
    experiments = {REPORT_EXPERIMENT: "the report's experiment in MLflow", STAMP_NAME: "a file in MLflow's folder of artifacts"}
    for key, names, taken in (("ablations", study.ablations, sections), ("tasks", study.tasks, experiments)):
        for name in names:
            if name in taken:
                yield f"{key}.{name}: is also the name of {taken[name]}, which it would overwrite. Fix: choose another name"
