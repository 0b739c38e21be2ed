"""Tests of models whose blocks have different mixers."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from cat.config import TrainingConfig
from cat.evaluation.diagnostics import (
    attention_statistics,
    filter_kernels,
    head_entropies,
    key_filter_solves_every_length,
    max_logit,
)
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.attention.layer import CausalAttention
from cat.mixers.mamba.config import MambaConfig
from cat.mixers.mamba.layer import Mamba
from cat.mixers.registry import AnyModel, HybridConfig
from cat.training.ensemble import fit_ensemble
from cat.training.fit import build_model, fit
from pipeline.config.code_digest import modules_reached
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.stages.plan import stage_modules, write
from tests.cat.training.test_ensemble import GRID, LENGTH, OPTIMIZER, VOCABULARY, successor
from tests.helpers.reference import close
from tests.helpers.study import ROOT

MAMBA = {"mixer": "mamba", "state": 3}
ATTENTION = {"mixer": "attention", "heads": 2, "position": "rotary", "qk_norm": True, "conv_k": 3}
MODEL = {"mixer": "hybrid", "width": 12, "layers": 4, "mlp": 2, "blocks": [MAMBA, ATTENTION]}


def configure(**changes):
    return TypeAdapter(AnyModel).validate_python({**MODEL, **changes})


def build(seed=0, **changes):
    return build_model(configure(**changes), vocabulary=VOCABULARY, length=LENGTH, seed=seed)


def test_the_blocks_are_repeated_up_to_the_layers():
    model = build()
    assert [type(block.mixer) for block in model.layers()] == 2 * [Mamba, CausalAttention]
    assert all(block.mlp is not None for block in model.layers())
    assert model.config.blocks == (
        MambaConfig(width=12, layers=1, **MAMBA),
        AttentionConfig(width=12, layers=1, **ATTENTION),
    )


def test_equal_blocks_equal_the_model_with_that_mixer():
    single = {key: value for key, value in {**MODEL, "layers": 2}.items() if key != "blocks"} | ATTENTION
    expected = build_model(TypeAdapter(AnyModel).validate_python(single), vocabulary=VOCABULARY, length=LENGTH, seed=0)
    model = build(layers=2, blocks=[ATTENTION, ATTENTION])
    for (name, weight), (its_name, its_weight) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == its_name
        assert torch.equal(weight, its_weight)


@pytest.mark.parametrize(
    "changes", [{}, {"position": "learned"}, {"position": "sinusoidal", "blocks": [ATTENTION, MAMBA]}], ids=str
)
def test_a_hybrid_is_causal_and_continues_from_its_cache(changes):
    model = build(**changes).double()
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    close(model(changed)[:, :5], logits[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], logits[:, 5:])
    _, caches = model.step(tokens[:, :4])
    close(model.step(tokens[:, 4:], caches)[0], logits[:, -1])
    positions = torch.tensor([[1, 4]]).expand(3, -1)
    close(model.logits_at(tokens, positions), logits[:, [1, 4]])


def test_learned_positions_belong_to_the_whole_model():
    model = build(position="learned")
    assert model.embedding.position.shape == (LENGTH, 12)
    assert model.max_length == LENGTH
    with pytest.raises(ValueError, match=f"learned positions reach {LENGTH} tokens"):
        model(torch.zeros(1, LENGTH + 1, dtype=torch.long))


def test_a_saved_configuration_restores_itself():
    config = configure()
    saved = config.model_dump(mode="json")
    assert all("width" not in block and "layers" not in block for block in saved["blocks"])
    assert TypeAdapter(AnyModel).validate_python(saved) == config


def test_diagnostics_cover_only_layers_that_have_them():
    model = build()
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    assert [statistics is None for statistics in attention_statistics(model, tokens, torch.ones_like(tokens).bool())] == 2 * [
        True,
        False,
    ]
    assert [heads and len(heads) for heads in head_entropies(model, tokens)] == 2 * [None, 2]
    assert max_logit(model, tokens) == pytest.approx(8, rel=0.1)  # tokens are equal, and 8 is the initial temperature
    assert max_logit(build(blocks=[MAMBA, {**MAMBA, "state": 2}]), tokens) is None
    assert [(kernel.layer, kernel.projection) for kernel in filter_kernels(model)] == [(2, "k"), (2, "k"), (4, "k"), (4, "k")]
    assert key_filter_solves_every_length(model) is None


def test_an_ensemble_of_hybrids_equals_separate_training():
    seeds, rates = zip(*GRID[:3], strict=True)
    options = {
        "optimizer_config": OPTIMIZER,
        "training_config": TrainingConfig(steps=5, batch=4, learning_rates=[0.1]),
        "stop_early": False,
    }
    data = successor(18), successor(7, seed=1)
    ensemble = fit_ensemble([build(seed) for seed in seeds], *data, learning_rates=rates, seeds=seeds, **options)
    for run, seed, rate in zip(ensemble, seeds, rates, strict=True):
        separate = fit(build(seed), *data, learning_rate=rate, seed=seed, **options)
        for name, weight in separate.model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers = 3 must be a multiple of the number of blocks, 2"),
        ({"blocks": [MAMBA]}, "a hybrid needs at least 2"),
        ({"blocks": [MAMBA, {**ATTENTION, "width": 8}]}, "block 1: width = 8 is a key of the model, not of a block"),
        ({"blocks": [MAMBA, {**ATTENTION, "mlp": 8}]}, "block 1: mlp = 8 is a key of the model, not of a block"),
        ({"blocks": [{**ATTENTION, "position": "learned"}, MAMBA]}, "block 0: position = learned is a key of the model"),
        ({"blocks": [MAMBA, {**ATTENTION, "heads": 5}]}, "heads = 5 does not divide width = 12"),
        ({"blocks": [MAMBA, MODEL]}, "block 1: width = 12 is a key of the model"),
        ({"blocks": [MAMBA, {"mixer": "hybrid", "blocks": []}]}, "hybrid.* does not match any of the expected tags"),
        ({"position": "rotary"}, "should be 'none', 'learned' or 'sinusoidal'"),
    ],
    ids=str,
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        configure(**changes)


def test_a_block_must_fit_the_training_length():
    with pytest.raises(ValueError, match=r"block 1: conv_k = 20 is longer than the training length of 16"):
        configure(blocks=[MAMBA, {**ATTENTION, "conv_k": 20}]).check_length(16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("blocks: [{mixer: mamba}, {mixer: attention, heads: 3, position: none}]", "blocks.1: heads = 3 does not divide width"),
        ("blocks: [{mixer: mamba, heads: 2}, {mixer: mamba}]", "blocks.0.heads = 2: mixer 'mamba' has no heads"),
        ("blocks: [{mixer: mamba, stat: 2}, {mixer: mamba}]", "blocks.0.stat = 2: unknown key; did you mean 'state'?"),
        ("blocks: [{mixer: mamba}, {mixer: mambo}]", "blocks.1.mixer = \"mambo\": "),
        ("blocks: [{mixer: mamba}, {state: 2}]", "blocks.1.mixer: is missing"),
        ("blocks: [{mixer: mamba, state: x}, {mixer: mamba}]", "blocks.0.state = \"x\": must be a"),
        ("blocks: 3", "blocks = 3: must be a list"),
        ("layers: 3", "layers = 3 must be a multiple of the number of blocks"),
        ("blocks: [{mixer: mamba}, {mixer: attention, heads: 2, position: none, conv_k: 99}]", "block 1: conv_k = 99"),
    ],
)  # fmt: skip
def test_an_invalid_block_of_a_study_is_one_line_of_error(line, message, tmp_path):
    text = (ROOT / "presets/smoke.yaml").read_text(encoding="utf-8")
    key = line.partition(":")[0]
    valid = {
        "blocks": "blocks: [{mixer: mamba}, {mixer: attention, heads: 2, position: none, conv_q: 3, conv_k: 3}]",
        "layers": "layers: 2",
    }
    (old,) = [row for row in text.splitlines() if row.startswith("  mamba_qk:")]
    assert valid[key] in old
    file = tmp_path / "params.yaml"
    file.write_text(text.replace(old, old.replace(valid[key], line)), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_study(file)
    (error,) = caught.value.lines
    assert message in error
    assert "variants.mamba_qk" in error


def test_a_hybrid_depends_on_the_code_and_the_defaults_of_all_its_mixers(tmp_path, monkeypatch):
    study = load_study(ROOT / "presets/smoke.yaml")
    assert isinstance(study.variants["mamba_qk"], HybridConfig)
    monkeypatch.chdir(tmp_path)
    write(study)
    listed = (tmp_path / "plan/train/mamba_qk.txt").read_text(encoding="utf-8")
    reached = modules_reached(stage_modules(study)["train/mamba_qk"])
    assert {"cat.mixers.mamba.layer", "cat.mixers.attention.layer", "cat.mixers.mamba.op"} <= reached
    assert "blocks.0.expand: 2\n" in listed
    assert "blocks.1.sharing: head\n" in listed
    assert "blocks.1.width" not in listed
