"""Example configurations of Hyena."""

from cat.mixers.hyena.config import HyenaConfig

BASELINE = HyenaConfig(conv_size=4, filter_size=32)
EXAMPLES = {
    "plain": HyenaConfig(conv_size=3, filter_size=5),
    "small": HyenaConfig(conv_size=1, filter_size=2),
}
