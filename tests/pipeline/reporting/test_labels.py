"""Names of variants."""

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.registry import model_config
from pipeline.reporting.labels import _describe, _details


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
