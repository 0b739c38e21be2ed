"""Models and the layer initialize themselves again: from the meta device, and sharded over processes."""

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from cat import ConvolutionAugmentedAttention, SequenceModel
from cat.ops.linear import apply_linear
from tests.cat.training.test_distributed import in_processes
from tests.helpers.mixers import EXAMPLES, ONE_PER_MIXER, configure

LENGTH, VOCABULARY = 9, 11
MODELS = {
    **{name: EXAMPLES[name] for name in (*ONE_PER_MIXER, "attention_channel", "mamba")},
    "learned": {"mixer": "attention", "heads": 3, "position": "learned", "mlp": 2, "activation": "swiglu"},
    "canon": {"mixer": "attention", "heads": 3, "mlp": 2, "canon": "ABCD"},
    "tied": {"mixer": "attention", "heads": 3, "tied": True, "norm": "rms"},
}


def build(name):
    settings = MODELS[name]
    config = configure(**{"mlp": 2, **settings})
    return SequenceModel(config, vocabulary=VOCABULARY, length=LENGTH)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_the_meta_device_starts_like_any_other(name):
    torch.manual_seed(0)
    expected = build(name)
    with torch.device("meta"):
        model = build(name)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    model.reset_parameters()
    for (key, tensor), like in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert tensor.isfinite().all(), key
        if tensor.numel() > 8:  # the norm of a few random numbers says little
            assert 0.6 < (tensor.norm() + 1e-9) / (like.norm() + 1e-9) < 1.6, key
    tokens = torch.arange(LENGTH)[None] % VOCABULARY
    assert model(tokens).isfinite().all()


SHARDED = ("attention_channel", "performer_all", "mamba", "delta_all", "canon")


def shard_and_train(rank):
    """Return the losses of two steps of sharded models from the meta device, and of whole ones with the same weights."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=40))
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(rank)  # each process draws the numbers of its part
    losses = [], []
    for name in SHARDED:
        with torch.device("meta"):
            model = build(name)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        model.to_empty(device="cpu")
        model.reset_parameters()
        for buffer in model.buffers():  # they are not sharded
            torch.distributed.broadcast(buffer, 0)
        whole = build(name)
        whole.load_state_dict({key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in model.state_dict().items()})
        tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
        for trained, of in zip((model, whole), losses, strict=True):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
            for _ in range(2):
                loss = nn.functional.cross_entropy(trained(tokens).mT, tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                of.append(loss.item())
    torch.distributed.destroy_process_group()
    return losses


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu device mesh")
def test_a_model_sharded_from_the_meta_device_trains_like_a_whole_one():
    results = in_processes(2, shard_and_train)
    for losses in results:
        assert isinstance(losses, tuple), "a process failed"
        sharded, whole = losses
        assert len(sharded) == 2 * len(SHARDED)
        torch.testing.assert_close(torch.tensor(sharded), torch.tensor(whole), rtol=1e-5, atol=1e-6)


class LowRank(nn.Module):
    """A layer beside a frozen one, as in LoRA. It has no `weight`."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def layer(**options):
    torch.manual_seed(0)
    return ConvolutionAugmentedAttention(12, 2, conv_q=4, conv_k=3, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_projection_can_be_wrapped(dtype):
    cat, x = layer(dtype=dtype), torch.randn(2, LENGTH, 12).to(dtype)
    expected = cat(x)
    cat.mixer.q_proj = LowRank(cat.mixer.q_proj).to(dtype)
    torch.testing.assert_close(cat(x), expected)
    cat(x).square().sum().backward()
    assert cat.mixer.q_proj.up.weight.grad.norm() > 0
    assert cat.mixer.q_proj.base.weight.grad is None
    assert cat.mixer.k_proj.weight.grad.norm() > 0


def test_hooks_and_parametrizations_of_a_projection_apply():
    cat, x = layer(), torch.randn(2, LENGTH, 12)
    before, seen = cat(x), []
    hook = cat.mixer.v_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(cat(x), before)
    assert seen == [(2, LENGTH, 12)]
    hook.remove()
    parametrize.register_parametrization(cat.mixer.v_proj, "weight", Negated())
    torch.testing.assert_close(cat(x), -before)


def test_plain_projections_are_one_product(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: calls.append(weight.shape) or x @ weight.T)
    projections = [nn.Linear(12, 12, bias=False) for _ in range(3)]
    apply_linear(torch.randn(2, 12), projections)
    assert calls == [(36, 12)]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_quantized_layer_computes_nearly_the_same():
    cat, x = layer(), torch.randn(2, LENGTH, 12)
    expected = cat(x)
    quantized = torch.ao.quantization.quantize_dynamic(cat, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.mixer.q_proj) is not nn.Linear
    assert (quantized(x) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "options", [{}, {"sharing": "channel"}, {"filter_bias": True}, {"qk_norm": True}, {"temperature": True}], ids=str
)
def test_kernels_and_temperatures_may_stay_in_float32(options):
    cat = layer(dtype=torch.bfloat16, **options)
    exact, x = layer(**options), torch.randn(2, LENGTH, 12)
    for name, parameter in cat.named_parameters():
        if not name.endswith("proj.weight"):
            parameter.data = parameter.data.float()
    y = cat(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - exact(x)).norm() < 0.05 * exact(x).norm()
    token, _ = cat.step(x[:, :1].bfloat16())
    torch.testing.assert_close(token, y[:, :1])
    y.square().sum().backward()
    assert cat.mixer.filters["q"].kernel.grad.dtype == torch.float32
