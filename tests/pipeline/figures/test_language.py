"""Bits per byte by position, and gains on recalled targets: tables and figures equal the values of the models."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cat.evaluation.scores import Split, token_scores
from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.config.study import Ablation
from pipeline.figures.drawing.palette import style
from pipeline.figures.drawing.style import save
from pipeline.figures.recall import gains, gains_table
from pipeline.reporting.labels import variant_label
from pipeline.stages.evaluate import Job, ModelResults, _evaluate_model
from pipeline.stages.generate import generate
from pipeline.storage import runs
from pipeline.storage.task_data import read_split, read_task
from tests.helpers.figures import draw
from tests.helpers.study import edit, stage, tiny_study

LENGTHS, TRAINED = (16, 32, 64), 32
POSITIONS = Ablation(
    question="?", tasks=[], variants=[], reference_tasks=["text"], reference_variants=["none", "qk", "mamba"], plot="positions"
)
RECALL = Ablation(
    question="?", tasks=[], variants=[], reference_tasks=["text"], reference_variants=["none", "k", "mamba"], plot="recall"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of a tiny text with word tokens, trained and evaluated."""
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_study(folder, tasks=["copying", "text"])
        known, new = ["one", "two", "three", "fourteen", "\n"], ["one", "two", "unheard", "of"]
        words = [*np.random.default_rng(0).choice(known, 10_000), *np.random.default_rng(1).choice(new, 1300)]
        (folder / "x.txt").write_text(" ".join(words))
        edit(**{"tasks.text.data.source": str(folder / "x.txt"), "tasks.text.data.tokens": "words"})
        stage("generate", "text")
        for cell in cells(load_study()):
            if cell.task == "text":
                stage("train", "text", cell.variant)
        stage("evaluate", "text")
    return folder


def read_results():
    return pd.read_csv("results/text.csv")


def test_recalled_targets_have_their_own_loss_at_every_length(study):
    results = read_results().pivot_table(index=["variant", "seed", "length"], columns="metric", values="value")
    model = runs.load_model(runs.weights_path("text", "k", 0))
    for length in LENGTHS:
        parts = token_scores(model, Split.of(*map(torch.tensor, read_split("text", f"test_{length}"))))
        loss = torch.cat([part.loss[part.is_target] for part in parts]).double().numpy().reshape(32, 32)
        with np.load("heldout/text/recalled.npz") as masks:
            recalled, rare = masks[f"recalled_{length}"], masks[f"rare_{length}"]
        row = results.loc["k", 0, length]
        assert row["recalled_share"] == recalled.mean() > 0
        assert row["recalled_rare_share"] == rare.mean()
        assert row["loss_recalled"] == pytest.approx(loss[recalled].mean())
        assert row["loss_others"] == pytest.approx(loss[~recalled].mean())
        share = row["recalled_share"]
        assert share * row["loss_recalled"] + (1 - share) * row["loss_others"] == pytest.approx(row["loss"])
    assert results["recalled_share"].groupby(["variant", "seed"]).apply(lambda shares: shares.is_monotonic_increasing).all()


def test_a_seed_that_diverged_has_empty_losses_and_no_bits(study):
    path = runs.folder("text", "k") / "summary.json"
    summary = json.loads(path.read_text())
    for run in summary["runs"]:
        run["stop"] = "diverged" if run["seed"] == 1 else run["stop"]
    path.write_text(json.dumps(summary))
    runs.weights_path("text", "k", 1).unlink()
    found, whole = (
        _evaluate_model("text", read_task("text"), "float32", job, torch.device("cpu"), lambda done: None)
        for job in (Job("k", summary["learning_rate"], 1), Job("k", summary["learning_rate"], 0))
    )
    assert isinstance(found, ModelResults)
    assert all(math.isnan(row["value"]) for row in found.scores)
    names = [row["metric"] for row in whole.scores if not row["metric"].startswith("attention_")]
    assert [row["metric"] for row in found.scores] == names


def test_other_tasks_have_only_the_header(study):
    generate("copying", study.tasks["copying"].data, 0)
    for cell in cells(study):
        if cell.task == "copying":
            stage("train", "copying", cell.variant)
    stage("evaluate", "copying")
    assert not pd.read_csv("results/copying.csv")["metric"].str.contains("recalled").any()
    assert not Path("heldout/copying/recalled.npz").exists()


def test_a_gain_is_the_loss_difference_to_the_reference_of_the_same_seed(study):
    results = read_results()
    table = gains(study, RECALL, results).set_index(["variant", "length", "seed"])
    value = results.set_index(["variant", "length", "seed", "metric"])["value"]
    assert set(table.index) == {(v, n, s) for v in ("k", "mamba") for n in LENGTHS for s in (0, 1)}
    for (variant, length, seed), row in table.iterrows():
        for name, metric in (("recalled", "loss_recalled"), ("others", "loss_others"), ("all", "loss")):
            assert row[name] == value["none", length, seed, metric] - value[variant, length, seed, metric]
        share = row["recalled_share"]
        assert row["from recalled"] + (1 - share) * row["others"] == pytest.approx(row["all"], abs=1e-6)


def test_the_table_of_gains_has_the_share_of_recalled_targets(study):
    results = read_results()
    share = results.loc[results["metric"] == "recalled_share"].groupby("length")["value"].first()
    losses_of_k = results["variant"].eq("k") & results["metric"].isin(["loss", "loss_recalled"])
    results.loc[losses_of_k, "value"] = results.loc[
        results["variant"].eq("none") & results["metric"].isin(["loss", "loss_recalled"]), "value"
    ].to_numpy()
    results.loc[losses_of_k & results["metric"].eq("loss"), "value"] -= 0.5
    results.loc[losses_of_k & results["metric"].eq("loss_recalled"), "value"] -= 0.25
    table = gains_table(study, RECALL, results).set_index(["length", "variant"])
    assert set(table.index) == {(n, v) for n in (32, 64) for v in ("k", "mamba")}
    for length in (32, 64):
        row = table.loc[length, "k"]
        assert (row["recalled"], row["all"]) == pytest.approx((0.25, 0.5))
        assert row["share of gain"] == f"{share[length] * 0.5:.0%}"
    results.loc[results["variant"].eq("k") & results["metric"].eq("loss"), "value"] += 1
    assert set(gains_table(study, RECALL, results).set_index("variant").loc["k", "share of gain"]) == {"no gain"}


def test_full_context_has_marks_and_a_sliding_window_is_level_and_thin(study, tmp_path):
    bits = read_results().query("metric == 'bits_per_byte'")
    figure = draw("positions", study, POSITIONS, bits)
    (axes,) = figure.axes
    *lines, mark = axes.lines
    assert [*mark.get_xdata()] == [TRAINED, TRAINED]
    bits = bits.groupby(["variant", "length"])["value"].mean()
    for variant, full, sliding in zip(("none", "qk", "mamba"), lines[::2], lines[1::2], strict=True):
        np.testing.assert_allclose(full.get_xydata(), bits[variant].reset_index().to_numpy())
        assert (full.get_marker(), full.get_color()) == (style(study, variant)["marker"], sliding.get_color())
        assert (sliding.get_marker(), sliding.get_linestyle()) == ("None", ":")
        np.testing.assert_allclose(sliding.get_xydata(), [[TRAINED, bits[variant, TRAINED]], [64, bits[variant, TRAINED]]])
    assert [text.get_text() for text in figure.legends[0].texts] == [
        variant_label(study, variant) for variant in ("none", "qk", "mamba")
    ]
    save(figure, tmp_path / "x.svg")


def test_the_validation_loss_is_per_token(study):
    """Not per byte: the loss of an untrained model is the logarithm of the vocabulary."""
    axes = draw("training", study, RECALL, read_results()).axes[0]
    assert axes.get_ylabel() == "validation loss, nats per token"
    size = study.tasks["text"].data.vocabulary
    starts = [line.get_ydata()[0] for line in axes.lines if len(line.get_ydata())]
    assert starts == pytest.approx([math.log(size)] * len(starts), rel=0.3)


def test_gains_are_drawn_per_class_at_the_training_length_and_the_longest(study, tmp_path):
    results = read_results()
    figure = draw("recall", study, RECALL, results)
    table = gains(study, RECALL, results)
    for length, axes in zip((32, 64), figure.axes, strict=True):
        assert axes.get_title() == f"text, {length} tokens"
        means = table[table["length"] == length].groupby("variant")[["recalled", "recalled, rare", "others"]].mean()
        drawn = {round(float(y), 9) for line in axes.lines if len(line.get_xdata()) == 2 for y in line.get_ydata()}
        assert {round(float(y), 9) for y in means.to_numpy().ravel() if not math.isnan(y)} <= drawn
        assert [label.get_text().rpartition("\n")[0] for label in axes.get_xticklabels()] == [
            "CAT-K, kernel 3,\nno QK-norm",
            "Mamba",
        ]
    assert [text.get_text() for text in figure.legends[0].texts] == ["recalled", "recalled, rare", "others"]
    save(figure, tmp_path / "x.svg")


def test_a_reference_without_the_longest_length_leaves_a_panel_empty(study, tmp_path):
    results = read_results()
    shown = results[~(results["variant"].eq("none") & results["length"].eq(64))]
    figure = draw("recall", study, RECALL, shown)
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == [
        "CAT-K, kernel 3,\nno QK-norm\nno gain",
        "Mamba\nno gain",
    ]
    save(figure, tmp_path / "x.svg")
