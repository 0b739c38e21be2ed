"""Names of variants."""

import pytest

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.registry import model_config
from pipeline.config.load import study_of
from pipeline.reporting.labels import _describe, _details, task_label, variant_label
from pipeline.reporting.tables import departures, is_published
from tests.pipeline.config.test_study import edited, errors_of


def test_every_option_of_attention_is_in_the_name():
    plain = AttentionConfig(heads=4, qk_norm=True, position="rotary")
    options = {"kv_heads": 2, "rope_base": 5e5, "rope_scale": 4.0, "window": 64, "dropout": 0.1, "bias": True}
    added = [*_details(plain.model_copy(update=options))][len([*_details(plain)]) :]
    assert added == ["2 key heads", "RoPE base 500000", "RoPE scale 4", "window 64", "dropout 0.1", "biases"]


def test_every_option_of_convolutions_is_in_the_name():
    plain = AttentionConfig(heads=4, qk_norm=True, conv_k=4)
    options = {"token_shift": True, "residual": True, "filter_init": "uniform"}
    assert [*_details(plain.model_copy(update=options))] == ["token shift", "residual", "uniform start", *_details(plain)]


def test_the_places_of_canon_layers_are_in_the_name():
    settings = {"mixer": "attention", "width": 8, "layers": 2, "heads": 1, "qk_norm": True}
    assert _describe(model_config(**settings, canon="AB"), frozenset()) == "Transformer, Canon-AB, 2 layers"


def test_short_convolutions_are_in_the_name_where_they_are_not_published():
    settings = {"width": 8, "layers": 1, "heads": 1}
    short = {"conv_q": 4, "conv_k": 4, "conv_v": 4}
    gla = {"mixer": "gla", "gate_rank": 2}
    models = [gla, gla | short, {"mixer": "delta"}, {"mixer": "delta", "gate": False}]
    names = [_describe(model_config(**settings, **model), frozenset()) for model in models]
    assert names == ["GLA", "GLA, convolutions", "Gated DeltaNet", "DeltaNet"]


def test_departures_name_the_keys_of_published_layers():
    settings = {"width": 8, "layers": 2, "heads": 1}
    gla = {"mixer": "gla", "gate_rank": 2, "output_gate": False}
    cases = {
        "-": model_config(mixer="mamba", width=8, layers=2),
        "gate_rank: 2, output_gate: false": model_config(**settings, **gla),
        "gla: gate_rank: 2, output_gate: false; delta: conv_q: null, sharing: head": model_config(
            mixer=[gla, {"mixer": "delta", "conv_q": None, "sharing": "head"}], **settings
        ),
        "mamba: expand: 1": model_config(mixer=["mamba", "attention"], expand=1, conv_k=4, **settings),
    }
    for text, model in cases.items():
        assert (departures(model), is_published(model)) == (text, True)
    attention = model_config(mixer="attention", qk_norm=True, **settings)
    assert (departures(attention), is_published(attention)) == ("-", False)


def test_a_label_in_the_file_is_the_name():
    stated = {"variants.k.label": "Key CAT", "tasks.ar.label": "MQAR", "variants.qk.label": "Key CAT", "title": "A study"}
    study = study_of(edited(stated), "params.yaml")
    assert [variant_label(study, name) for name in ("k", "qk")] == ["Key CAT (k)", "Key CAT (qk)"], "names are unique"
    assert (task_label(study, "ar"), study.title) == ("MQAR", "A study")
    assert study.variants == study_of(edited({}), "params.yaml").variants


@pytest.mark.parametrize(("value", "shown"), [("", '""'), ("two\nlines", '"two\\nlines"'), (3, "3")])
def test_a_label_is_one_line_of_text(value, shown):
    assert errors_of({"variants.k.label": value}) == [f"variants.k.label = {shown}: must be one line of text"]
    (line,) = errors_of({"defaults.label": "x"})
    assert line.startswith("defaults.label = ")
