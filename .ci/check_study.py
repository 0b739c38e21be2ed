"""Check a finished study in this folder: it is complete, up to date, and a change reruns only dependent stages."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML

sys.path.insert(0, str(Path.cwd()))

from pipeline.config.claims import load as load_claims
from pipeline.config.grid import cells, seeds_of, shown_tasks, shown_variants
from pipeline.config.load import load_study
from pipeline.config.outputs import figure_plots
from pipeline.reporting.labels import variant_label, with_slug
from pipeline.storage.results import read_results


def repro() -> list[str]:
    """Run `dvc repro` and return the stages that it ran."""
    done = subprocess.run(["dvc", "repro"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^Running stage '(.+)':", done.stdout, flags=re.MULTILINE)


def mlflow_runs() -> dict[str, list[str]]:
    """Return the names of the current runs per MLflow experiment."""
    client = MlflowClient("sqlite:///mlflow.db")
    experiments = client.search_experiments()
    assert "Default" not in {e.name for e in experiments}, "the empty default experiment of MLflow was not removed"
    runs_of = {e.name: client.search_runs([e.experiment_id], "tags.current = 'yes'", max_results=9999) for e in experiments}
    return {name: sorted(run.info.run_name for run in runs) for name, runs in runs_of.items()}


def checkpoints() -> dict[Path, int]:
    """Return the time of the last change of each checkpoint."""
    return {path: path.stat().st_mtime_ns for path in Path("checkpoints").rglob("*.safetensors")}


def recorded_outputs() -> dict[str, str]:
    """Return the DVC stage and output digest that the MLflow runs record."""
    client = MlflowClient("sqlite:///mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.current = 'yes'", max_results=9999)
    return {run.data.tags["dvc.stage"]: run.data.tags["dvc.md5"] for run in runs if "dvc.md5" in run.data.tags}


def expected_runs() -> dict[str, list[str]]:
    """Return the names that the runs of params.yaml must have."""
    study = load_study()
    names = {
        task: sorted(
            with_slug(variant_label(study, cell.variant), cell.variant) + end
            for cell in cells(study)
            if cell.task == task
            for end in ["", *(f" seed {seed}" for seed in seeds_of(study, cell.task, cell.variant))]
        )
        for task in study.tasks
    }
    return {**names, "study": ["report"]}


study = load_study()
results = read_results(study)
for cell in cells(study):
    rows = results[(results["task"] == cell.task) & (results["variant"] == cell.variant) & (results["metric"] == "accuracy")]
    limit = study.variants[cell.variant].max_length(study.tasks[cell.task].data.length)
    lengths = {n for n in study.tasks[cell.task].data.lengths if limit is None or n <= limit}
    seeds = seeds_of(study, cell.task, cell.variant)
    assert {*zip(rows["seed"], rows["length"], strict=True)} == {(s, n) for s in seeds for n in lengths}, cell
    assert rows["value"].between(0, 1).all(), cell
for name, ablation in study.ablations.items():
    enabled = shown_tasks(study, ablation) and shown_variants(ablation)
    for file in figure_plots(name, ablation) if enabled else ():
        assert Path(f"reports/figures/{file}.svg").stat().st_size > 5000, file
for task in study.tasks:
    filters = pd.read_csv(f"results/filters/{task}.csv")
    convolved = {c.variant for c in cells(study) if c.task == task and study.variants[c.variant].has_convolution}
    # Only the kernels on queries, keys and values are listed, not the kernels of Canon layers.
    convolved -= {name for name, variant in study.variants.items() if getattr(variant, "canon", None)}
    assert convolved <= set(filters["variant"]), (task, convolved)
assert pd.read_csv("verdicts/claims.csv")["claim"].tolist() == list(load_claims())
figures = len(list(Path("reports/figures").iterdir()))
assert Path("reports/report.html").read_text().count("<svg ") == figures + 1, "all figures, and the cost by training time"
assert mlflow_runs() == expected_runs()
stages = YAML(typ="safe").load(Path("dvc.lock"))["stages"]
trained = [f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in cells(study)]
assert recorded_outputs() == {name: stages[name]["outs"][0]["md5"] for name in trained}
print("complete: grid, figures, filters, verdicts, report, MLflow")

assert repro() == [], "a second `dvc repro` ran something"
assert mlflow_runs() == expected_runs()
print("up to date: nothing ran again")

lock, before = Path("dvc.lock").read_text(), checkpoints()
raw = YAML(typ="safe").load(Path("params.yaml"))
raw["variants"]["mamba"]["expand"] = 1
raw["variants"]["none"]["training"] = {"tasks": {"text": {"seeds": 3}}}
raw["tasks"]["nar3"]["data"]["test_examples"] += 1
with Path("params.yaml").open("w") as file:
    YAML().dump(raw, file)
ran = repro()
edited = {f"train_{c.ablation}@{c.task}-{c.variant}" for c in cells(study) if c.variant == "mamba"}
assert len(edited) == 2
assert {stage for stage in ran if stage.startswith("train_")} == {*edited, "train_qkv_subsets@text-none"}, ran
assert [stage for stage in ran if stage.startswith("generate")] == ["generate@nar3"], ran
added = {path for path, time in checkpoints().items() if before.get(path) != time and path.parts[2] != "mamba"}
assert [path.relative_to("checkpoints").as_posix() for path in added] == ["text/none/0.005_2.safetensors"], added
assert mlflow_runs() == expected_runs()
print("exact: only the edited variant's cells and the added seed were trained; other test sequences retrained nothing")

shutil.copy("presets/smoke.yaml", "params.yaml")
ran = repro()
assert not [stage for stage in ran if stage.startswith("train_")], ran
assert Path("dvc.lock").read_text() == lock
print("reverted: dvc.lock is the same as before, and the cells came from DVC's cache")

source = Path("cat/ops/attention.py")
text = source.read_text()
source.write_text(text + "\n# A comment.\n")
Path("mlflow.db").unlink()
shutil.rmtree("mlartifacts")
assert sorted(repro()) == ["plan", "publish"], "a comment reran more than the plan, or the lost store was not rebuilt"
source.write_text(text)
assert mlflow_runs() == expected_runs()
print("exact: a comment reruns nothing; MLflow rebuilt from the files")
