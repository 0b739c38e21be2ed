"""Example configurations of the gated convolution."""

from cat.mixers.gated_conv.config import GatedConvConfig

EXAMPLES = {
    "plain": GatedConvConfig(),
    "alone": GatedConvConfig(conv_size="full", expand=1, gate=False),
    "short": GatedConvConfig(conv_size=1, expand=1),
}
