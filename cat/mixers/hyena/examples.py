"""Example configurations of Hyena."""

from cat.mixers.hyena.config import HyenaConfig

BASELINE = HyenaConfig(filter_size=16)
EXAMPLES = {
    "plain": HyenaConfig(),
    "small": HyenaConfig(conv_size=1, filter_size=2, filter_layers=1, filter_features=5),
}
