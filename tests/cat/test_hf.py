"""`cat.hf`: the models of the study in transformers compute the same, generate the same, and survive saving and loading."""

import importlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cat.evaluation.generation import generate
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.tasks.tokenizer import BPE, Bytes, Words
from tests.helpers.mixers import EXAMPLES
from tests.helpers.study import ROOT

VOCABULARY, LENGTH = 256, 13
HYBRIDS = {
    "hybrid": {"mixer": ["mamba", "attention"], "layers": 4, "heads": 3, "conv_k": 4, "mlp": 2, "tied": True},
    "hybrid_learned": {"mixer": ["attention", "linear"], "heads": 3, "position": "learned", "norm": "rms"},
    "hybrid_sinusoidal": {"mixer": ["delta", "hyena"], "heads": 3, "position": "sinusoidal"},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(scope="module")
def hf():
    """The module, imported late: importing transformers takes seconds, which not every test process needs."""
    return importlib.import_module("cat.hf")


def build(**settings):
    torch.manual_seed(0)
    config = model_config(**{"width": 24, "layers": 2, **settings})
    return SequenceModel(config, vocabulary=VOCABULARY, length=LENGTH).eval()


def tokens(rows, length, seed=0):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def continuation(model, prompt, count):
    return torch.stack(list(generate(model, prompt, count)), dim=1)


@pytest.fixture
def reload(hf, tmp_path):
    """Save a model of the study, and load it with transformers."""

    def reload(model, tokenizer=None):
        hf.save(model, tmp_path, tokenizer)
        return hf.AutoModelForCausalLM.from_pretrained(tmp_path)

    return reload


@pytest.mark.parametrize("settings", [*EXAMPLES.values(), *HYBRIDS.values()], ids=[*EXAMPLES, *HYBRIDS])
def test_a_saved_model_computes_and_generates_the_same(reload, settings):
    model = build(**settings)
    loaded = reload(model)
    prompts = tokens(3, 7)
    assert type(loaded).__name__ == "CatForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == loaded.num_parameters()
    with torch.no_grad():
        assert torch.equal(loaded(prompts).logits, model(prompts))
        assert torch.allclose(loaded(prompts, use_cache=True).logits, model(prompts), atol=1e-5)
    # Prompts of unequal length are padded on the left.
    mask = torch.ones_like(prompts).index_put_((torch.tensor([1, 1, 1, 2]), torch.tensor([0, 1, 2, 0])), torch.tensor(0))
    found = loaded.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 7:]
    alone = [continuation(model, prompt[keep.bool()][None], 6)[0] for prompt, keep in zip(prompts, mask, strict=True)]
    assert torch.equal(found, torch.stack(alone))
    # Without a cache, beam search computes every sequence anew, so it cannot mix up the caches of its beams.
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    assert torch.equal(loaded.generate(prompts, **beams), loaded.generate(prompts, use_cache=False, **beams))
