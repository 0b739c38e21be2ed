"""What must hold of a finished study in this folder: complete, also in MLflow, at rest, and exact about what a change reruns."""

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
from pipeline.config.grid import cells, shown_tasks, shown_variants
from pipeline.config.load import load_study
from pipeline.figures.plots import figures_of
from pipeline.storage.results import read_results


def repro() -> list[str]:
    """Runs `dvc repro`; the stages that it ran."""
    done = subprocess.run(["dvc", "repro"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^Running stage '(.+)':", done.stdout, flags=re.MULTILINE)


def mlflow_runs() -> dict[str, list[str]]:
    """Names of the runs by experiment."""
    client = MlflowClient("sqlite:///mlflow.db")
    experiments = client.search_experiments()
    assert "Default" not in {e.name for e in experiments}, "the empty experiment that MLflow creates is in the way"
    page = {e.name: client.search_runs([e.experiment_id], "tags.current = 'yes'", max_results=9999) for e in experiments}
    return {name: sorted(run.info.run_name for run in runs) for name, runs in page.items()}


def origins() -> dict[str, str]:
    """What the runs say of dvc.lock: stage and digest of its output."""
    client = MlflowClient("sqlite:///mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.current = 'yes'", max_results=9999)
    return {run.data.tags["dvc.stage"]: run.data.tags["dvc.md5"] for run in found if "dvc.md5" in run.data.tags}


study = load_study()
expected = {
    task: sorted(
        f"{c.variant}{end}" for c in cells(study) if c.task == task for end in ["", *(f" seed {s}" for s in study.seeds)]
    )
    for task in study.tasks
}
expected["study"] = ["report"]

results = read_results(study)
for cell in cells(study):
    here = results[(results["task"] == cell.task) & (results["variant"] == cell.variant) & (results["metric"] == "accuracy")]
    longest = study.variants[cell.variant].max_length(study.tasks[cell.task].data.length)
    lengths = {n for n in study.tasks[cell.task].data.lengths if longest is None or n <= longest}
    assert {*zip(here["seed"], here["length"], strict=True)} == {(s, n) for s in study.seeds for n in lengths}, cell
    assert here["value"].between(0, 1).all(), cell
for name, ablation in study.ablations.items():
    switched_on = shown_tasks(study, ablation) and shown_variants(ablation)
    for file in figures_of(name, ablation) if switched_on else ():
        for folder, suffix in (("figures", "png"), ("svg", "svg")):
            assert Path(f"reports/{folder}/{file}.{suffix}").stat().st_size > 5000, (file, suffix)
for task in study.tasks:
    filters = pd.read_csv(f"results/filters/{task}.csv")
    filtered = {c.variant for c in cells(study) if c.task == task and study.variants[c.variant].has_convolution}
    assert filtered <= set(filters["variant"]), (task, filtered)
assert pd.read_csv("verdicts/claims.csv")["claim"].tolist() == list(load_claims())
assert Path("reports/report.html").read_text().count("<svg ") == len(list(Path("reports/svg").iterdir())) + 1, (
    "the figures, and that of cost"
)
assert mlflow_runs() == expected
stages = YAML(typ="safe").load(Path("dvc.lock"))["stages"]
trained = [f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in cells(study)]
assert origins() == {name: stages[name]["outs"][0]["md5"] for name in trained}
print("complete: grid, figures, filters, verdicts, report, MLflow")

assert repro() == [], "a second `dvc repro` ran something"
assert mlflow_runs() == expected
print("at rest: nothing ran again")

lock = Path("dvc.lock").read_text()
raw = YAML(typ="safe").load(Path("params.yaml"))
raw["variants"]["qk"]["k"] = 2
with Path("params.yaml").open("w") as file:
    YAML().dump(raw, file)
ran = repro()
trained = {stage for stage in ran if stage.startswith("train_")}
assert trained == {f"train_{c.ablation}@{c.task}-{c.variant}" for c in cells(study) if c.variant == "qk"}, ran
assert mlflow_runs() == expected
print("exact: only the cells of the edited variant were trained again")

shutil.copy("presets/smoke.yaml", "params.yaml")
repro()
raw = YAML(typ="safe").load(Path("params.yaml"))
raw["tasks"]["copying"]["data"]["test"] += 1
with Path("params.yaml").open("w") as file:
    YAML().dump(raw, file)
ran = repro()
assert sorted(ran) == ["evaluate@copying", "generate@copying", "judge", "plan", "publish", "render"], ran
assert mlflow_runs() == expected
print("exact: other test sequences trained nothing again")

shutil.copy("presets/smoke.yaml", "params.yaml")
ran = repro()
assert Path("dvc.lock").read_text() == lock
print("reverted: dvc.lock is what it was")

source = Path("cat/ops/attention.py")
text = source.read_text()
source.write_text(text + "\n# A remark.\n")
assert repro() == ["plan"], "a comment ran more than the plan"
source.write_text(text)
assert set(repro()) <= {"plan"}, "the comment taken out again ran more than the plan"
print("exact: a comment reruns nothing")

Path("mlflow.db").unlink()
shutil.rmtree("mlartifacts")
assert repro() == ["publish"]
assert mlflow_runs() == expected
print("MLflow rebuilt from the files")
