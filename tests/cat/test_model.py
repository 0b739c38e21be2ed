"""The parts of a block that are no mixer, against their formulas."""

import pytest
import torch

from cat.mixers.attention.config import AttentionConfig
from cat.model import SequenceModel
from cat.training.fit import split_by_weight_decay

LLAMA = {"mlp": 3, "activation": "swiglu", "norm": "rms"}


def model(**changes):
    line = {"mixer": "attention", "width": 8, "layers": 2, "heads": 2, "position": "none", "conv_k": 3, **changes}
    torch.manual_seed(0)
    built = SequenceModel(AttentionConfig(**line), vocabulary=11, length=9).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # scales of norms are 1 at first
    return built


def rms_norm(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def test_a_gated_mlp_behind_an_rms_norm_is_its_formula():
    block = model(**LLAMA).blocks[1]
    norm, inner, out = block.mlp
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = x + block.mixer(rms_norm(x, block.mixer_norm.weight))
    y = rms_norm(mixed, norm.weight)
    gate, up = y @ inner.gate_and_up.weight[:24].T, y @ inner.gate_and_up.weight[24:].T
    expected = mixed + (gate * torch.sigmoid(gate) * up) @ out.weight.T + out.bias
    torch.testing.assert_close(block(x), expected)


def test_the_head_reads_what_the_chosen_norm_makes():
    built = model(**LLAMA)
    tokens = torch.tensor([[1, 5, 10, 0]])
    x = built.embedding(tokens)
    for block in built.blocks:
        x = block(x)
    torch.testing.assert_close(built(tokens), rms_norm(x, built.norm.weight) @ built.head.weight.T)


def test_weight_decay_is_on_the_maps_of_a_gated_mlp_and_on_no_norm():
    built = model(**LLAMA)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    decayed = {names[id(p)] for p in split_by_weight_decay(built)[0]}
    assert {"blocks.0.mlp.1.gate_and_up.weight", "blocks.0.mlp.2.weight"} < decayed
    assert not any("norm" in name or name.endswith("mlp.0.weight") for name in decayed)


def test_an_activation_needs_an_mlp():
    with pytest.raises(ValueError, match="activation = swiglu needs an MLP"):
        model(activation="swiglu")
