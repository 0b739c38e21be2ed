"""Blocks with different mixers in one model."""

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
from tests.cat.training.test_ensemble import GRID, LENGTH, PROTOCOL, VOCABULARY, successor
from tests.helpers.reference import close
from tests.helpers.study import ROOT

MAMBA = {"mixer": "mamba", "state": 3}
ATTENTION = {"mixer": "attention", "heads": 2, "position": "rotary", "qk_norm": True, "k": 3}
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


def test_equal_blocks_are_the_model_with_that_mixer():
    one = {key: value for key, value in {**MODEL, "layers": 2}.items() if key != "blocks"} | ATTENTION
    other = build_model(TypeAdapter(AnyModel).validate_python(one), vocabulary=VOCABULARY, length=LENGTH, seed=0)
    model = build(layers=2, blocks=[ATTENTION, ATTENTION])
    for (name, weight), (its_name, its_weight) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == its_name
        assert torch.equal(weight, its_weight)


@pytest.mark.parametrize(
    "changes", [{}, {"position": "learned"}, {"position": "sinusoidal", "blocks": [ATTENTION, MAMBA]}], ids=str
)
def test_it_is_causal_and_goes_on_from_what_it_has_read(changes):
    model = build(**changes).double()
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    close(model(changed)[:, :5], logits[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], logits[:, 5:])
    _, memories = model.step(tokens[:, :4])
    close(model.step(tokens[:, 4:], memories)[0], logits[:, -1])
    at = torch.tensor([[1, 4]]).expand(3, -1)
    close(model.logits_at(tokens, at), logits[:, [1, 4]])


def test_learned_positions_are_those_of_the_whole_model():
    model = build(position="learned")
    assert model.embedding.position.shape == (LENGTH, 12)
    assert model.max_length == LENGTH
    with pytest.raises(ValueError, match=f"learned positions reach {LENGTH} tokens"):
        model(torch.zeros(1, LENGTH + 1, dtype=torch.long))


def test_what_is_saved_of_it_makes_it_again():
    config = configure()
    saved = config.model_dump(mode="json")
    assert all("width" not in block and "layers" not in block for block in saved["blocks"])
    assert TypeAdapter(AnyModel).validate_python(saved) == config


def test_each_layer_is_looked_at_for_what_it_is():
    model = build()
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    assert [statistics is None for statistics in attention_statistics(model, tokens, torch.ones_like(tokens).bool())] == 2 * [
        True,
        False,
    ]
    assert [heads and len(heads) for heads in head_entropies(model, tokens)] == 2 * [None, 2]
    assert max_logit(model, tokens) == pytest.approx(8, rel=0.1)  # of equal tokens, at the first temperature
    assert max_logit(build(blocks=[MAMBA, {**MAMBA, "state": 2}]), tokens) is None
    assert [(one.layer, one.projection) for one in filter_kernels(model)] == [(2, "k"), (2, "k"), (4, "k"), (4, "k")]
    assert key_filter_solves_every_length(model) is None


def test_replicas_are_what_each_is_alone():
    seeds, rates = zip(*GRID[:3], strict=True)
    options = {
        "protocol": PROTOCOL,
        "schedule": TrainingConfig(steps=5, batch=4, learning_rates=[0.1]),
        "stop_early": False,
    }
    data = successor(18), successor(7, seed=1)
    together = fit_ensemble([build(seed) for seed in seeds], *data, learning_rates=rates, seeds=seeds, **options)
    for run, seed, rate in zip(together, seeds, rates, strict=True):
        alone = fit(build(seed), *data, learning_rate=rate, seed=seed, **options)
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 3}, "layers = 3 must be a multiple of the blocks, two or more, not of 2"),
        ({"blocks": [MAMBA]}, "layers = 4 must be a multiple of the blocks, two or more, not of 1"),
        ({"blocks": [MAMBA, {**ATTENTION, "width": 8}]}, "block 1: width is said of the whole model, not of a block"),
        ({"blocks": [MAMBA, {**ATTENTION, "mlp": 8}]}, "block 1: mlp is said of the whole model, not of a block"),
        ({"blocks": [{**ATTENTION, "position": "learned"}, MAMBA]}, "block 0: learned positions are added to tokens"),
        ({"blocks": [MAMBA, {**ATTENTION, "heads": 5}]}, "heads = 5 does not divide width = 12"),
        ({"blocks": [MAMBA, MODEL]}, "block 1: width is said of the whole model"),
        ({"blocks": [MAMBA, {"mixer": "hybrid", "blocks": []}]}, "hybrid.* does not match any of the expected tags"),
        ({"position": "rotary"}, "should be 'none', 'learned' or 'sinusoidal'"),
    ],
    ids=str,
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        configure(**changes)


def test_a_block_is_held_to_the_training_length():
    with pytest.raises(ValueError, match=r"block 1: k = 20 taps is longer than the training length of 16"):
        configure(blocks=[MAMBA, {**ATTENTION, "k": 20}]).check_length(16)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("blocks: [{mixer: mamba}, {mixer: attention, heads: 3, position: none}]", "blocks.1: heads = 3 does not divide width"),
        ("blocks: [{mixer: mamba, heads: 2}, {mixer: mamba}]", "blocks.0.heads = 2: mixer 'mamba' has no heads"),
        ("blocks: [{mixer: mamba, stat: 2}, {mixer: mamba}]", "blocks.0.stat = 2: unknown key; did you mean 'state'?"),
        ("blocks: [{mixer: mamba}, {mixer: mambo}]", "blocks.1.mixer = \"mambo\": is not attention or"),
        ("blocks: [{mixer: mamba}, {state: 2}]", "blocks.1: mixer is missing"),
        ("blocks: [{mixer: mamba, state: x}, {mixer: mamba}]", "blocks.0.state = \"x\": is not a whole number"),
        ("blocks: 3", "blocks = 3: is not a list"),
        ("layers: 3", "layers = 3 must be a multiple of the blocks"),
        ("blocks: [{mixer: mamba}, {mixer: attention, heads: 2, position: none, k: 99}]", "block 1: k = 99 taps is longer than"),
    ],
)  # fmt: skip
def test_a_study_says_in_one_line_what_is_wrong_with_a_block(line, words, tmp_path):
    text = (ROOT / "presets/smoke.yaml").read_text(encoding="utf-8")
    key = line.partition(":")[0]
    said = {"blocks": "blocks: [{mixer: mamba}, {mixer: attention, heads: 2, position: none, q: 3, k: 3}]", "layers": "layers: 2"}
    (old,) = [row for row in text.splitlines() if row.startswith("  mamba_qk:")]
    assert said[key] in old
    file = tmp_path / "params.yaml"
    file.write_text(text.replace(old, old.replace(said[key], line)), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_study(file)
    (said_once,) = caught.value.lines
    assert words in said_once
    assert "variants.mamba_qk" in said_once


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
