"""Example configurations of softmax attention: every kind of convolution, for all mixers that share its code."""

from cat.mixers.attention.config import AttentionConfig

EXAMPLES = {
    "plain": AttentionConfig(heads=3),
    "grouped": AttentionConfig(heads=6, kv_heads=2, conv_q=2, conv_k=3, conv_v=3, sharing="channel", window=5),
    "bias": AttentionConfig(heads=3, kv_heads=1, position="rotary", rope_base=100.0, rope_scale=2.0, bias=True),
    "alibi_window": AttentionConfig(heads=6, kv_heads=3, conv_k="state", filter_size=2, position="alibi", window=7),
    "q": AttentionConfig(heads=3, conv_q=3, position="rotary"),
    "k": AttentionConfig(heads=3, conv_k="full", position="alibi"),
    "v": AttentionConfig(heads=3, conv_v=1, conv_activation="silu"),
    "all": AttentionConfig(heads=3, conv_q=2, conv_k=4, conv_v="full", filter_norm=True, qk_norm=True),
    "channel": AttentionConfig(
        heads=3, conv_q=3, conv_k="full", sharing="channel", filter_bias=True, qk_norm=True, conv_activation="silu"
    ),
    "mixing": AttentionConfig(heads=3, conv_k=3, conv_v="full", sharing="mixing", filter_norm=True, dilation=2),
    "network": AttentionConfig(heads=3, conv_q="network", conv_v="network", filter_size=5, temperature=True),
    "decay": AttentionConfig(heads=3, conv_q="decay", conv_k="decay", conv_v=2, filter_size=3, filter_init="random"),
    "canon": AttentionConfig(heads=3, conv_q=4, conv_k=4, conv_v=4, sharing="channel", residual=True, filter_init="uniform"),
    "shift": AttentionConfig(heads=3, conv_k=2, conv_v=2, filter_init="shift"),
    "primer": AttentionConfig(heads=3, conv_q=3, conv_k=3, conv_v=3, sharing="channel", filter_init="primer"),
    "token_shift": AttentionConfig(heads=3, kv_heads=1, token_shift=True, conv_k=3, position="rotary"),
    "residual": AttentionConfig(heads=3, conv_q="state", conv_k="full", conv_v=3, sharing="mixing", filter_size=2, residual=True),
    "state": AttentionConfig(heads=3, conv_k="state", conv_v="state", filter_size=3, sharing="channel"),
}
