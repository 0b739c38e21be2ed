"""Checks that every mixer must pass, each on one example configuration.

A check raises AssertionError with one line if the mixer fails it. Mixers are built in float64 with 24 channels and a training
length of 13, always with the same weights. tests/cat/mixers/test_mixers.py and `python -m pipeline check-mixer` run the checks.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from cat.config import MixerConfig
from cat.mixers import filters
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Cache, Mixer
from cat.mixers.build import build_mixer
from cat.mixers.registry import mixer_examples, mixer_module
from cat.ops.common import reset_parameters
from cat.ops.conv import reference

BATCH, WIDTH, LENGTH = 2, 24, 13
LONGER = 2 * LENGTH + 3
"""A length beyond that of the training."""
BASELINE_WIDTH = 64
SIZE_TOLERANCE = 0.2
"""Relative difference in parameters between a mixer and attention. Embeddings are about half of a model."""


def output_has_the_input_shape(config: MixerConfig) -> None:
    mixer = build(config)
    for batch, length in ((BATCH, 1), (BATCH, 2), (BATCH, LENGTH), (BATCH, LONGER), (0, LENGTH), (0, 150)):
        x = torch.zeros(batch, length, WIDTH, dtype=torch.float64)
        y = mixer(x)
        _expect(y.shape == x.shape, f"an input of shape {tuple(x.shape)} has an output of shape {tuple(y.shape)}")


def projection_is_per_token(config: MixerConfig) -> None:
    """A model may look up the projection of a token, or project tokens without a batch."""
    mixer, x = build(config), normal(BATCH, LENGTH, WIDTH)
    by_token = [mixer.project(token) for token in x.flatten(0, 1)]
    _close("the projection of one token", torch.stack(by_token), mixer.project(x).flatten(0, 1))


def output_depends_on_earlier_tokens_only(config: MixerConfig) -> None:
    """The pattern of the Jacobian is the lower triangle, at a length beyond the chunks of most operations."""
    length = 67
    mixer, x = build(config, length), normal(1, length, WIDTH).requires_grad_()
    outputs = mixer(x)[0] @ normal(WIDTH, seed=1)
    gradients = [torch.autograd.grad(out, x, retain_graph=True)[0][0] for out in outputs]
    depends = torch.stack([(gradient != 0).any(-1) for gradient in gradients])
    for i, j in depends.triu(1).nonzero().tolist():
        raise AssertionError(f"the output at token {i} depends on the later token {j}")
    expected = torch.eye(length) if config.selects_tokens else torch.ones(length, length).tril()
    for i, j in (expected.bool() & ~depends).nonzero().tolist():
        fix = "" if i == j else ". Fix: if the mixer selects tokens, set selects_tokens = True in its configuration"
        raise AssertionError(f"the output at token {i} does not depend on token {j}{fix}")


def outputs_at_positions_are_those_of_all(config: MixerConfig) -> None:
    for length in (3, LONGER):
        mixer, positions = build(config), torch.tensor([[0, 2], [1, length - 1]])
        x = normal(BATCH, length, WIDTH).requires_grad_()
        some, every = mixer(x, positions), mixer(x)[torch.arange(2)[:, None], positions]
        _close("the output at single positions", some, every)
        _close_gradients("with single positions", gradients_of(mixer, x, some), gradients_of(mixer, x, every))


def every_weight_has_a_gradient(config: MixerConfig) -> None:
    mixer, x = build(config), normal(BATCH, LENGTH, WIDTH)
    for name, gradient in gradients_of(mixer, x.requires_grad_(), mixer(x)).items():
        zeros = (gradient == 0).sum().item()
        _expect(zeros == 0, f"{zeros} of {gradient.numel()} gradients of {name} are zero")


def sequences_of_a_batch_are_independent(config: MixerConfig) -> None:
    mixer, x = build(config), normal(BATCH, LONGER, WIDTH)
    _close("the output of one sequence of a batch", mixer(x), torch.cat([mixer(sequence) for sequence in x.split(1)]))


def float32_agrees_with_float64(config: MixerConfig) -> None:
    mixer, x = build(config, LONGER), normal(BATCH, LONGER, WIDTH)
    exact = mixer(x)
    _close("the output in float32", mixer.float()(x.float()).double(), exact, rtol=1e-4, atol=1e-5)


def bfloat16_is_usable(config: MixerConfig) -> None:
    """Autocast to bfloat16 agrees roughly with float32, and a mixer in bfloat16 has finite outputs and gradients in it."""
    mixer, x = build(config, LONGER).float(), normal(BATCH, LONGER, WIDTH).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x)
    error = ((rough - mixer(x)).norm() / mixer(x).norm()).item()
    close = config.selects_tokens or error < 0.05  # rounding may select another token
    _expect(close, f"under autocast to bfloat16, the output differs from float32 by {error:.0%}")
    for length in (LONGER, 150):  # convolutions are matrix products at the first length, FFTs at the second
        mixer, x = build(config, length).bfloat16(), normal(BATCH, length, WIDTH).bfloat16().requires_grad_()
        y = mixer(x)
        for name, tensor in {"output": y, **gradients_of(mixer, x, y)}.items():
            _expect(tensor.dtype == torch.bfloat16, f"in bfloat16, {name} is {tensor.dtype}")
            _expect(bool(tensor.isfinite().all()), f"in bfloat16, {name} is not finite")


def no_intermediate_gradient_is_nan(config: MixerConfig) -> None:
    mixer, x = build(config), normal(BATCH, 50, WIDTH).requires_grad_()
    with warnings.catch_warnings(action="ignore"), torch.autograd.set_detect_anomaly(True):
        try:
            mixer(x).square().sum().backward()
        except RuntimeError as error:
            raise AssertionError(" ".join(str(error).split())) from None


def step_continues_from_a_cache(config: MixerConfig) -> None:
    """Tokens one by one and in parts, also beyond the training length."""
    mixer = build(config)
    for parts in ([1] * LENGTH, [6, 1, 4, LONGER - 11]):
        projected, cache = mixer.project(normal(BATCH, sum(parts), WIDTH)), Cache()
        expected = mixer.mix(projected)
        for part in projected.split(parts, dim=1):
            last, last_cache = mixer.step(part, cache, last=True)
            start = cache.length
            out, cache = mixer.step(part, cache)
            where = f"{part.shape[1]} token(s) after {start}"
            _expect(cache.length == start + part.shape[1], f"{where}: the cache has a length of {cache.length}")
            _close(f"step with {where}", out, expected[:, start : cache.length])
            _close(f"step with {where}, last = True", last, out[:, -1:])
            _expect(last_cache.state.keys() == cache.state.keys(), f"{where}: the cache depends on last")
            for name, state in cache.state.items():
                _close(f"{where}: {name} in the cache, last = True", last_cache.state[name], state)


def documents_equal_separate_sequences(config: MixerConfig) -> None:
    """Documents of a row, and padded batches. Padding is NaN, and one row has nothing else."""
    mixer, end = build(config), LONGER
    batches = {
        "of a row": [(0, 0, 1), (0, 1, LENGTH), (0, LENGTH, end), (1, 0, end), (2, 0, 4), (2, 4, 5), (2, 5, 6), (2, 6, end)],
        "with padding on the right": [(0, 0, LENGTH), (1, 0, end)],
        "with padding on the left": [(0, LENGTH, end), (2, end - 1, end)],
    }
    for where, documents in batches.items():
        ids = torch.zeros(3, end, dtype=torch.long)
        for index, (row, start, stop) in enumerate(documents, 1):
            ids[row, start:stop] = index
        padding = ids[..., None] == 0
        x = normal(3, end, WIDTH).masked_fill(padding, float("nan")).requires_grad_()
        y = mixer(x, attention_mask=ids > 0) if padding.any() else mixer(x, segment_ids=ids)
        expected = torch.zeros_like(y)
        for row, start, stop in documents:
            expected[row, start:stop] = mixer(x[row : row + 1, start:stop])[0]
        _close(f"the output of documents {where}", y, expected)
        _close_gradients(f"of documents {where}", gradients_of(mixer, x, y), gradients_of(mixer, x, expected))


def padded_prompts_equal_separate_prompts(config: MixerConfig) -> None:
    """A padded prompt, then tokens one by one and in parts, also beyond the training length."""
    mixer, padding = build(config), torch.tensor([0, 5, 8])
    outputs: list[Tensor] = []
    for name, parameter in mixer.named_parameters():  # biases of filters are zero at first
        if name.endswith("bias"):
            parameter.data += normal(*parameter.shape, seed=1)
    projected, cache = mixer.project(normal(3, LONGER, WIDTH)), Cache(padding=padding)
    for part in projected.split([9, 1, 1, 4, LONGER - 15], dim=1):
        last, _ = mixer.step_padded(part, cache, last=True)
        out, cache = mixer.step_padded(part, cache)
        _close(f"step_padded until token {cache.length}, last = True", last, out[:, -1:])
        outputs.append(out)
    for row, first in enumerate(padding.tolist()):
        expected = F.pad(mixer.mix(projected[row : row + 1, first:]), (0, 0, first, 0))
        _close(f"step_padded after {first} tokens of padding", torch.cat(outputs, dim=1)[row : row + 1], expected)


def attention_weights_are_a_mean(config: MixerConfig) -> None:
    """For `has_attention`: causal, non-negative weights with sum one, and the outputs are those of the weights."""
    if not config.has_attention:
        return
    mixer: Any = build(config)
    q, k, v, *others = mixer.prepare(mixer.project(normal(BATCH, LENGTH, WIDTH)))
    weights = mixer.attend(q, k, torch.eye(LENGTH, dtype=torch.float64).expand(*v.shape[:2], -1, -1), *others)
    repeated = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # heads of queries may share heads of values
    _expect(bool((weights >= 0).all()), "attention weights are negative, but has_attention is True")
    _expect(not weights.triu(1).any(), "attention weights of later tokens are not zero")
    _close("the sum of attention weights", weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
    _close("attention weights times values", weights @ repeated, mixer.attend(q, k, v, *others))


def operations_equal_their_references(config: MixerConfig) -> None:
    """Outputs and gradients equal those with every operation replaced by its reference implementation.

    The reference implementation of `f` is `naive_f` in the module of `f`. It has the same arguments.
    """
    layer = import_module(mixer_module(config.mixer, "layer"))
    references = [*_references(layer), *_references(filters)]
    if find_spec(path := mixer_module(config.mixer, "op")) is not None:
        twins = {name for name in vars(import_module(path)) if name.startswith("naive_")}
        _expect(bool(twins), "op.py has no reference implementation: a function whose name begins with naive_")
        for twin in sorted(twins - {naive.__name__ for _, _, naive in references}):
            raise AssertionError(
                f"layer.py does not import {twin.removeprefix('naive_')}, whose reference implementation is {twin}"
            )
    mixer = build(config)
    for length in (1, 19):  # shorter than some kernels, and longer than `full` ones
        x = normal(BATCH, length, WIDTH).requires_grad_()
        actual = mixer(x)
        actual_gradients = gradients_of(mixer, x, actual)
        with contextlib.ExitStack() as stack:
            for module, name, naive in references:
                stack.enter_context(mock.patch.object(module, name, naive))
            expected = mixer(x)
            expected_gradients = gradients_of(mixer, x, expected)
        _close(f"the output at length {length}", actual, expected, than="the reference implementation")
        _close_gradients(f"at length {length}", actual_gradients, expected_gradients)


def gradients_are_those_of_finite_differences(config: MixerConfig) -> None:
    """torch.autograd.gradcheck also passes undefined gradients to the backward passes."""
    mixer = build(config)
    names, weights = zip(*mixer.named_parameters(), strict=True)

    def outputs(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (x,))

    for length in (LENGTH, 131):  # beyond the matrices of convolutions
        x = normal(1, length, WIDTH).requires_grad_()
        try:
            gradcheck(outputs, (x, *weights), fast_mode=True)
        except GradcheckError as error:
            raise AssertionError(" ".join(str(error).split())) from None


def vmap_computes_each_sequence(config: MixerConfig) -> None:
    """On a GPU, the seeds of a cell are trained together with torch.vmap."""
    mixer = build(config)
    weights = {name: parameter.detach() for name, parameter in mixer.named_parameters()}

    def loss(weights: dict[str, Tensor], sequence: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, weights, (sequence[None],)).square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    for length in (19, 131):
        x = normal(BATCH, length, WIDTH)
        with warnings.catch_warnings():
            # PyTorch maps over some of its own operations one by one.
            warnings.filterwarnings("ignore", "There is a performance drop")
            actual_weights, actual_x = torch.vmap(gradients, in_dims=(None, 0))(weights, x)
        for index, sequence in enumerate(x):
            expected_weights, expected_x = gradients(weights, sequence)
            actual = {"the input": actual_x[index], **{name: gradient[index] for name, gradient in actual_weights.items()}}
            _close_gradients("under vmap", actual, {"the input": expected_x, **expected_weights})


def shapes_need_no_data(config: MixerConfig) -> None:
    """The cost of a variant is counted on the meta device."""
    mixer, x = build(config).to("meta"), torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.float64, device="meta")
    y = mixer(x)
    y.sum().backward()
    _expect(y.shape == x.shape, f"on the meta device, the output has shape {tuple(y.shape)}")


def reset_initializes_every_tensor(config: MixerConfig) -> None:
    """A model that is built on the meta device gets its weights from `reset_parameters` of each module that owns some."""
    mixer, built = build(config), build(config)
    for name, module in mixer.named_modules():
        owned = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        has_reset = callable(getattr(module, "reset_parameters", None))
        _expect(has_reset or not owned, f"{name or 'the mixer'} owns parameters or buffers and has no reset_parameters")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensor in mixer.state_dict().values():
            tensor.fill_(math.nan)
        torch.manual_seed(0)
        reset_parameters(mixer)
    for (name, tensor), expected in zip(mixer.state_dict().items(), built.state_dict().values(), strict=True):
        _expect(bool(tensor.isfinite().all()), f"reset_parameters leaves {name} as it is")
        scales = [t.square().mean().sqrt().item() for t in (tensor, expected)]
        _expect(max(scales) <= 4 * min(scales), f"after reset_parameters, {name} is about {scales[0]:.3g}, not {scales[1]:.3g}")


CHECKS: dict[str, Callable[[MixerConfig], None]] = {
    "shapes": output_has_the_input_shape,
    "projection": projection_is_per_token,
    "causality": output_depends_on_earlier_tokens_only,
    "positions": outputs_at_positions_are_those_of_all,
    "gradients": every_weight_has_a_gradient,
    "batch": sequences_of_a_batch_are_independent,
    "float32": float32_agrees_with_float64,
    "bfloat16": bfloat16_is_usable,
    "nan": no_intermediate_gradient_is_nan,
    "cache": step_continues_from_a_cache,
    "documents": documents_equal_separate_sequences,
    "prompts": padded_prompts_equal_separate_prompts,
    "attention": attention_weights_are_a_mean,
    "reference": operations_equal_their_references,
    "gradcheck": gradients_are_those_of_finite_differences,
    "vmap": vmap_computes_each_sequence,
    "meta": shapes_need_no_data,
    "reset": reset_initializes_every_tensor,
}
"""The checks of one example by name."""


def examples_cover_every_key(mixer: str) -> None:
    """Every key of the configuration has two values in the examples, except `heads`, and `dropout`, which is random."""
    examples = mixer_examples(mixer).values()
    for key in type(next(iter(examples))).model_fields:
        values = {str(getattr(example, key)) for example in examples}
        varied = key in ("heads", "dropout") or len(values) > 1
        _expect(varied, f"{key} = {', '.join(values)} in every example. Fix: add one with another value")


def baseline_has_the_size_of_attention(mixer: str) -> None:
    """`BASELINE` in examples.py, if there is one, has about as many parameters as attention."""
    baseline = getattr(import_module(mixer_module(mixer, "examples")), "BASELINE", None)
    if baseline is not None:
        size, expected = (count_parameters(config) for config in (baseline, AttentionConfig(heads=1)))
        within = abs(size - expected) <= SIZE_TOLERANCE * expected
        _expect(within, f"BASELINE has {size:,} parameters with {BASELINE_WIDTH} channels, and attention {expected:,}")


def torch_compile_traces_one_graph(mixer: str) -> None:
    """Forward and backward of every example, for one length and for lengths that vary.

    No kernels are generated, which would take up to a minute per example. The graph of the backward pass is traced for one
    length; for lengths that vary, which takes seven times as long, only that of the first example is.
    """
    from torch._dynamo.exc import TorchDynamoException  # the compiler takes seconds to import

    for index, (name, config) in enumerate(mixer_examples(mixer).items()):
        for dynamic in (False, True):
            built = build(config)
            torch.compiler.reset()
            backend = "eager" if dynamic and index > 0 else "aot_eager"
            compiled = torch.compile(built, backend=backend, fullgraph=True, dynamic=dynamic)
            for length in (LENGTH, LONGER) if dynamic else (LENGTH,):
                x = normal(BATCH, length, WIDTH).requires_grad_()
                try:
                    with warnings.catch_warnings(action="ignore"):
                        actual = compiled(x)
                except TorchDynamoException as error:
                    problem = " ".join(str(error).partition("from user code")[0].split())
                    raise AssertionError(f"{name}: torch.compile with dynamic={dynamic} finds no full graph: {problem}") from None
                expected, how = built(x), f"if compiled with dynamic={dynamic}"
                _close(f"{name}: the output {how}", actual, expected)
                _close_gradients(f"of {name} {how}", gradients_of(built, x, actual), gradients_of(built, x, expected))


FOLDER_CHECKS: dict[str, Callable[[str], None]] = {
    "examples": examples_cover_every_key,
    "baseline": baseline_has_the_size_of_attention,
    "compile": torch_compile_traces_one_graph,
}
"""The checks of a folder by name."""


def build(config: MixerConfig, length: int = LENGTH) -> Mixer:
    """Build a mixer in float64 with the same weights at every call. The global random state does not change."""
    config.check_width(WIDTH)
    config.check_length(length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_mixer(config, width=WIDTH, length=length).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return the same standard normal values in float64 at every call. The global random state is not used."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients_of(mixer: Mixer, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the input and of every weight, by name."""
    parameters = dict(mixer.named_parameters())
    cotangent = normal(*y.shape, seed=3).to(y.dtype)
    found = torch.autograd.grad(y, [x, *parameters.values()], cotangent, materialize_grads=True)
    return dict(zip(["the input", *parameters], found, strict=True))


def count_parameters(config: MixerConfig) -> int:
    """Count the parameters of a mixer with 64 channels, trained on sequences of 128 tokens."""
    return sum(parameter.numel() for parameter in build_mixer(config, width=BASELINE_WIDTH, length=128).parameters())


def _references(module: ModuleType) -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
    """The functions in a module's namespace that have a reference implementation: the module, the name, and the reference."""
    for name, function in vars(module).items():
        if inspect.isfunction(function):
            for owner in (sys.modules[function.__module__], reference):
                if (naive := getattr(owner, f"naive_{function.__name__}", None)) is not None:
                    yield module, name, naive
                    break


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(problem)


def _close(
    what: str, actual: Tensor, expected: Tensor, *, rtol: float = 1e-9, atol: float = 1e-11, than: str = "expected"
) -> None:
    """Compare up to the rounding of float64."""
    _expect(actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    wrong = ~torch.isclose(actual, expected, rtol=rtol, atol=atol)
    for index in wrong.nonzero().tolist():
        first, second = (tensor[tuple(index)].item() for tensor in (actual, expected))
        by = f"a difference of {abs(first - second):.1g}"
        raise AssertionError(f"{what} is not as {than}: {first:.6g} instead of {second:.6g} at {index}, {by}")


def _close_gradients(how: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        _close(f"the gradient of {name} {how}", actual[name], gradient)
