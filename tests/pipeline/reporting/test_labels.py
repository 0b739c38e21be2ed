"""Names of variants."""

from cat.mixers.attention.config import AttentionConfig
from pipeline.reporting.labels import _details


def test_every_option_of_attention_is_in_the_name():
    plain = AttentionConfig(heads=4, qk_norm=True, position="rotary")
    options = {"kv_heads": 2, "rope_base": 5e5, "rope_scale": 4.0, "window": 64, "dropout": 0.1, "bias": True}
    added = [*_details(plain.model_copy(update=options))][len([*_details(plain)]) :]
    assert added == ["2 key heads", "RoPE base 500000", "RoPE scale 4", "window 64", "dropout 0.1", "biases"]
