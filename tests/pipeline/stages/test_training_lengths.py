"""Cells of tasks with several training lengths, from params.yaml to results."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import cat.training.fit
from pipeline.config.load import load_study
from pipeline.runtime import workers
from pipeline.stages import train as training
from pipeline.stages.plan import table
from pipeline.storage import runs
from pipeline.storage.task_data import read_meta, read_task
from tests.helpers.study import read_params, stage, tiny_study, write_params
from tests.pipeline.runtime.test_checkpoints import digests

VARIANTS = {
    "learned": {"position": "learned"},
    "full": {"conv_q": "full", "conv_k": "full"},
    "state": {"conv_q": "state", "conv_k": "state", "filter_size": 3},
}
LENGTHS = {"list": ([9, 16], [9, 16]), "range": ({"from": 9, "to": 16}, [9, 10, 11, 12, 13, 14, 15, 16])}


@pytest.fixture(params=LENGTHS)
def lengths(request, tmp_path, monkeypatch):
    """A planned study with the data of a copying task. Returns the training lengths."""
    monkeypatch.chdir(tmp_path)
    tiny_study(tmp_path, tasks=["copying"])
    length, lengths = LENGTHS[request.param]
    ablation = {"question": "?", "tasks": ["copying"], "variants": [*VARIANTS], "plot": "lines"}
    raw = read_params() | {"variants": VARIANTS, "ablations": {"copying": ablation}}
    raw["tasks"]["copying"]["data"]["length"] = length
    raw["defaults"]["training"] |= {"steps": 18, "batch": 8, "seeds": [0]}
    write_params(raw)
    Path("dvc.yaml").unlink()
    stage("plan")
    stage("generate", "copying")
    training._splits.cache_clear()  # of the other lengths
    return lengths


def test_the_data_have_every_training_length(lengths):
    meta = json.loads(Path("data/copying/meta.json").read_text())
    assert (meta["length"], meta["training_lengths"], meta["config"]["length"]) == (16, lengths, lengths)
    splits = {name: split["length"] for name, split in meta["splits"].items()}
    assert splits == {**{f"train_{length}": length for length in lengths}, "valid": 16}
    assert sum(split["examples"] for name, split in meta["splits"].items() if name != "valid") == 256
    assert [split.inputs.shape[1] for split in runs.training_split("copying", torch.device("cpu")).splits] == lengths
    assert read_task("copying") == load_study().tasks["copying"].data
    assert read_meta("copying").mean_length == sum(lengths) / len(lengths)
    assert f"copying trains on sequences of {', '.join(map(str, lengths[:-1]))} and 16 tokens" in table(load_study())


def test_cells_train_on_every_length_and_are_evaluated(lengths, monkeypatch):
    used, backward = [], cat.training.fit.backward

    def recorded(model, batch, **options):
        used.append(batch.inputs.shape[1])
        return backward(model, batch, **options)

    monkeypatch.setattr(cat.training.fit, "backward", recorded)
    for variant in VARIANTS:
        used.clear()
        stage("train", "copying", variant)
        assert len(used) == 18
        assert set(used) == set(lengths)
    stage("evaluate", "copying")
    models = {variant: runs.load_model(runs.weights_path("copying", variant, 0)) for variant in VARIANTS}
    assert models["learned"].max_length == 16
    assert models["full"].blocks[0].mixer.filters["k"].kernel.shape == (2, 16)
    scores = pd.read_csv("results/copying.csv").query("metric == 'accuracy'")
    tested = scores.groupby("variant")["length"].agg(list).to_dict()
    assert tested == {"learned": [8, 16], "full": [8, 16, 32], "state": [8, 16, 32]}


def test_an_interrupted_run_resumes_to_the_same_bits(lengths, monkeypatch):
    stage("train", "copying", "state")
    expected = digests(Path("runs"))
    for path in [*Path("runs").rglob("*.*"), *Path("checkpoints").rglob("*.safetensors")]:
        path.unlink()
    lr_scale, steps = cat.training.fit.lr_scale, []

    def interrupted(*arguments):
        steps.append(None)
        if len(steps) == 7:
            monkeypatch.setattr(workers, "_stopping", True)
        return lr_scale(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cat.training.fit, "lr_scale", interrupted)
        with pytest.raises(workers.Stopped):
            training.train_jobs(cell(), tuple(cell().jobs), torch.device("cpu"), lambda message: None)
    monkeypatch.setattr(workers, "_stopping", False)
    steps.clear()
    monkeypatch.setattr(cat.training.fit, "lr_scale", lambda *arguments: steps.append(None) or lr_scale(*arguments))
    stage("train", "copying", "state")
    assert len(steps) == 11
    assert digests(Path("runs")) == expected


def test_such_runs_train_one_by_one_on_a_gpu(lengths):
    gpu, one_length = torch.device("cuda"), cell()._replace(meta=cell().meta._replace(training_lengths=(16,)))
    assert training.uses_ensemble(one_length, gpu)
    assert not training.uses_ensemble(cell(), gpu)


def cell():
    return training.Cell.of("copying", "state", training.CellSetting.of(load_study(), "copying", "state"))
