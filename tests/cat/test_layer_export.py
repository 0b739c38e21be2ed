"""torch.compile and torch.export of the layer and of models: one graph, which serves all lengths.

In processes of their own: the compiler cannot trace the shape checks of the tests.
"""

import subprocess
import sys

import pytest

GENERATED = {"filter_size": 3, "length": 16}
VARIANTS = {
    "plain": {},
    "short": {"conv_q": 3, "conv_k": 4, "conv_v": 4, "position": "rotary", "qk_norm": True},
    "long": {"conv_q": 20, "conv_k": 50, "dilation": 2, "position": "alibi"},
    "full": {"conv_k": "full", "conv_v": 1, "length": 9, "kv_heads": 1, "window": 7, "temperature": True},
    "channel": {"conv_q": 3, "conv_k": "full", "length": 33, "sharing": "channel", "filter_bias": True, "filter_norm": True},
    "mixing": {"conv_q": 3, "conv_k": 20, "sharing": "mixing", "dilation": 4, "filter_norm": True},
    "network": {"conv_q": "network", "conv_v": "network", "filter_norm": True, **GENERATED},
    "decay": {"conv_k": "decay", "sharing": "mixing", **GENERATED},
    "state": {"conv_k": "state", "conv_v": "state", "sharing": "channel", "position": "alibi", "window": 3, **GENERATED},
}
PREPARE = """
import warnings
import torch
from torch.export import Dim, export
from cat import ConvolutionAugmentedAttention

warnings.simplefilter("ignore")
torch.set_num_threads(1)

def build(settings):
    torch.manual_seed(0)
    return ConvolutionAugmentedAttention(24, 3, dtype=torch.float64, **settings).eval()

def equal(program, layer, lengths, batch=2):
    for length in lengths:
        x = torch.randn(batch, length, 24, dtype=torch.float64)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-8, atol=1e-9)
"""
EXPORT = """
LENGTHS = (1, 2, 5, 40, 300)
for name, settings in VARIANTS.items():
    layer, x = build(settings), torch.randn(2, 40, 24, dtype=torch.float64)
    for strict in (False, True):
        program = export(layer, (x,), dynamic_shapes={"x": {1: Dim("length", min=1, max=4096)}}, strict=strict)
        equal(program.module(), layer, LENGTHS)
"""
ANY_BATCH = """
layer, x = build({"conv_q": 3, "conv_k": "full", "length": 16}), torch.randn(2, 40, 24, dtype=torch.float64)
for dynamic in ({0: Dim("batch"), 1: Dim("length", max=4096)}, {0: Dim.AUTO, 1: Dim.AUTO}):
    program = export(layer, (x,), dynamic_shapes={"x": dynamic})
    for batch in (2, 3):
        equal(program.module(), layer, (2, 5, 300), batch)
"""
COMPILE = """
layer, x = build({"conv_q": 3, "conv_k": "full", "length": 16, "qk_norm": True}), torch.randn(2, 40, 24, dtype=torch.float64)
compiled = torch.compile(layer, fullgraph=True, dynamic=True)
for length in (40, 7):
    gradients = []
    for function in (compiled, layer):
        x = torch.randn(2, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = function(x)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(*gradients)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""
MODEL = """
from cat.model import SequenceModel
from tests.helpers.mixers import configure

for changes in ({"position": "rotary"}, {"position": "learned"}, {"canon": "ABCD", "activation": "swiglu"}):
    settings = {"mixer": "attention", "width": 24, "heads": 3, "conv_k": 3, "layers": 2, "mlp": 2, **changes}
    model = SequenceModel(configure(**settings), vocabulary=11, length=64).double()
    for method in (model.forward, model.logits_at):
        torch.compiler.reset()
        compiled = torch.compile(method, backend="aot_eager", fullgraph=True, dynamic=True)
        for length in (13, 31):
            arguments = [torch.randint(11, (2, length)), torch.tensor([[1, 5, 7], [2, 7, 9]])][: 1 + (method == model.logits_at)]
            results = []
            for function in (compiled, method):
                logits = function(*arguments)
                results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
            torch.testing.assert_close(*results)
"""


def run(script, variants=()):
    settings = {name: VARIANTS[name] for name in variants}
    subprocess.run([sys.executable, "-c", f"VARIANTS = {settings!r}\n{PREPARE}{script}"], check=True)


def test_the_layer_is_exported_for_all_lengths():
    run(EXPORT, ["short", "state"])


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_exported_for_all_lengths(variant):
    run(EXPORT, [variant])


@pytest.mark.long
def test_an_exported_layer_takes_any_batch():
    run(ANY_BATCH)


@pytest.mark.long
def test_the_generated_kernels_equal_the_layer():
    run(COMPILE)


@pytest.mark.long
def test_a_model_compiles_to_one_graph():
    run(MODEL)
