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
from tests.helpers.mixers import EXAMPLES, ONE_PER_MIXER
from tests.helpers.study import ROOT

VOCABULARY, LENGTH = 256, 13
HYBRIDS = {
    "hybrid": {"mixer": ["mamba", "attention"], "layers": 4, "heads": 3, "conv_k": 4, "mlp": 2, "tied": True},
    "learned": {"mixer": ["attention", "linear"], "heads": 3, "position": "learned", "norm": "rms"},
    "sinusoidal": {"mixer": ["delta", {"mixer": "gla", "gate_rank": 2}], "heads": 3, "position": "sinusoidal"},
}
ONE = {"mixer": "attention", "heads": 2, "conv_k": 4, "mlp": 1}


@pytest.fixture(scope="module")
def hf():
    """The module, imported late: importing transformers takes seconds, which not every test process needs."""
    return importlib.import_module("cat.hf")


@pytest.fixture
def reload(hf, tmp_path):
    """Save a model of the study, and load it with transformers."""

    def reload(model, tokenizer=None):
        hf.save(model, tmp_path, tokenizer)
        return hf.AutoModelForCausalLM.from_pretrained(tmp_path)

    return reload


def build(length=LENGTH, **settings):
    torch.manual_seed(0)
    config = model_config(**{"width": 24, "layers": 2, **settings})
    return SequenceModel(config, vocabulary=VOCABULARY, length=length).eval()


def tokens(rows, length, seed=0):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows=3, length=7):
    """Prompts of unequal length, with padding on the left."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, :3] = mask[2, :1] = 0
    return tokens(rows, length), mask


@pytest.mark.parametrize("settings", [*EXAMPLES.values(), *HYBRIDS.values()], ids=[*EXAMPLES, *HYBRIDS])
def test_a_saved_model_computes_and_generates_the_same(reload, settings):
    model = build(**settings)
    loaded = reload(model)
    prompts, mask = padded()
    assert type(loaded).__name__ == "CatForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == loaded.num_parameters()
    with torch.no_grad():
        assert torch.equal(loaded(prompts).logits, model(prompts))
        assert torch.allclose(loaded(prompts, use_cache=True).logits, model(prompts), atol=1e-5)
    found = loaded.generate(prompts, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, prompts.shape[1] :]
    for row, prompt, keep in zip(found, prompts, mask.bool(), strict=True):
        assert row.tolist() == [int(token) for token in generate(model, prompt[keep][None], 4)]


@pytest.mark.parametrize("name", [*ONE_PER_MIXER, *HYBRIDS])
def test_beams_keep_their_caches(hf, name):
    model = hf.CatForCausalLM.of(build(**(EXAMPLES | HYBRIDS)[name]))
    prompts, mask = padded()
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    # Without a cache, every sequence is computed anew, so there are no caches to mix up.
    assert torch.equal(model.generate(prompts, **beams), model.generate(prompts, use_cache=False, **beams))


def test_samples_are_drawn_from_the_same_distribution_with_and_without_a_cache(hf):
    model, (prompts, mask) = hf.CatForCausalLM.of(build(**ONE)), padded()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "max_new_tokens": 5, "use_cache": use_cache}
        found.append(model.generate(prompts, attention_mask=mask, **options))
    assert torch.equal(*found)
    assert found[0].unique(dim=0).shape[0] == 6


def test_generation_continues_a_cache(hf):
    model = hf.CatForCausalLM.of(build(**ONE))
    prompts, mask = padded()
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompts, attention_mask=mask, max_new_tokens=3, **options)
    mask = F.pad(mask, (0, 3), value=1)
    again = model.generate(first.sequences, attention_mask=mask, cache=first.cache, max_new_tokens=2, **options)
    assert torch.equal(again.sequences, model.generate(prompts, attention_mask=mask[:, :7], max_new_tokens=5, do_sample=False))
    with torch.no_grad():
        after = model(prompts[:, 4:], cache=model(prompts[:, :4], use_cache=True).cache).logits
        assert torch.allclose(after, model(prompts).logits[:, 4:], atol=1e-5)
        for padding in (mask[:, :7], mask[:, :7].flip(1)):
            found, expected = (model(prompts, attention_mask=padding, use_cache=cached).logits for cached in (True, False))
            assert torch.allclose(found[padding == 1], expected[padding == 1], atol=1e-5)


def test_the_loss_is_that_of_the_next_token_without_padding(hf):
    model = build(**ONE)
    wrapper = hf.CatForCausalLM.of(model)
    inputs, mask = padded()
    documents = [inputs[0], inputs[1, 3:], inputs[2, 1:]]
    losses = [F.cross_entropy(model(row[None])[0, :-1], row[1:], reduction="sum") for row in documents]
    loss = wrapper(inputs, attention_mask=mask, labels=inputs).loss
    assert torch.allclose(loss, sum(losses) / (6 + 3 + 5))
    rows = torch.cat([torch.cat([inputs[:1, :3], inputs[1:2, 3:]], 1), inputs[:1]])
    packed = wrapper(rows, segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7]), labels=rows)
    assert torch.allclose(packed.logits[:1], torch.cat([model(rows[:1, :3]), model(rows[:1, 3:])], 1), atol=1e-5)
    first = F.cross_entropy(model(rows[:1, :3])[0, :-1], rows[0, 1:3], reduction="sum")
    assert torch.allclose(packed.loss, (first + losses[1] + losses[0]) / (2 + 3 + 6))
    first, second, third = wrapper(inputs, labels=inputs, return_dict=False, use_cache=True)
    assert (first.shape, second.shape, type(third)) == ((), (3, 7, VOCABULARY), hf.CatCache)
    assert torch.allclose(wrapper(inputs, logits_to_keep=2).logits, second[:, -2:], atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fine_tuned_model_survives_saving(hf, reload, tmp_path, tied):
    model = reload(build(**ONE, tied=tied))
    inputs = tokens(2, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(model.train()(inputs, labels=inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[-1]
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    model.eval().save_pretrained(tmp_path / "tuned")
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(info.values())
    assert again.config.to_dict()["model"] == model.config.to_dict()["model"]
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16)
    assert torch.allclose(half(inputs).logits.float(), model(inputs).logits, atol=0.1)


def test_the_trainer_trains(hf, tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from transformers import Trainer, TrainingArguments

    model = hf.CatForCausalLM.of(build(**ONE))
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, LENGTH)]
    before = model(tokens(8, LENGTH), labels=tokens(8, LENGTH)).loss
    options = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    assert model.eval()(tokens(8, LENGTH), labels=tokens(8, LENGTH)).loss < before


def test_weights_that_a_folder_lacks_are_initialized_and_the_others_kept(hf, tmp_path):
    hf.save(build(**ONE, filter_bias=False), tmp_path, None)
    other = build(**ONE, conv_v=3, filter_bias=True)
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, model=other.config.model_dump(mode="json"), output_loading_info=True
    )
    found = model.state_dict()
    assert info["missing_keys"] == found.keys() - saved.keys() != set()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    # Convolutions start as the identity with a little noise.
    assert all(
        torch.allclose(found[name], other.state_dict()[name.removeprefix("model.")], atol=0.4) for name in info["missing_keys"]
    )


def test_config_json_describes_the_model(hf, tmp_path):
    model = build(**HYBRIDS["hybrid"])
    hf.save(model, tmp_path, Bytes())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["vocab_size"], saved["training_length"]) == ("cat", VOCABULARY, LENGTH)
    assert saved["model"] == model.config.model_dump(mode="json")
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert config.study == model.config
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (24, 4, LENGTH)
    assert config.tie_word_embeddings is True
    assert hf.CatConfig().study.layers == 1


def test_a_mixer_of_another_package_is_found_by_its_import_path(hf, reload, tmp_path, monkeypatch):
    package = tmp_path / "elsewhere" / "mean"
    package.mkdir(parents=True)
    (package / "config.py").write_text(
        "from cat.config import MixerConfig\n\n\nclass MeanConfig(MixerConfig):\n    scale: float = 1.0\n"
    )
    (package / "layer.py").write_text(
        "import torch\nfrom cat.mixers.base import Mixer\n\n\n"
        "class Mean(Mixer):\n    def __init__(self, config, *, width, length):\n        super().__init__()\n"
        "        self.scale = config.scale\n\n    def project(self, x):\n        return x\n\n"
        "    def mix(self, projected, positions=None):\n"
        "        count = torch.arange(1, projected.shape[1] + 1)[:, None]\n"
        "        mean = self.scale * projected.cumsum(1) / count\n"
        "        return mean if positions is None else mean.gather(1, positions[..., None].expand(-1, -1, mean.shape[2]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build(mixer=["elsewhere.mean", "attention"], heads=2, scale=0.5)
    loaded = reload(model)
    prompt = tokens(1, 5)
    assert loaded.config.model["mixers"][0] == {"mixer": "elsewhere.mean", "scale": 0.5}
    assert loaded.generate(prompt, do_sample=False, max_new_tokens=3)[0, 5:].tolist() == [*map(int, generate(model, prompt, 3))]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "attention_mask has padding between the tokens of row 0"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
        ({"use_cache": True, "segment_ids": torch.zeros(1, 4, dtype=torch.long)}, "segment_ids need whole sequences"),
        ({"cached": 2, "attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\), not \(1, 6\)"),
        ({"cached": 2, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "attention_mask has padding after cached tokens"),
        ({"cached": 10}, "learned positions reach 13 tokens, not 14"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(hf, arguments, problem):
    model, options = hf.CatForCausalLM.of(build(**HYBRIDS["learned"])), dict(arguments)
    if cached := options.pop("cached", 0):
        options["cache"] = model(tokens(1, cached), use_cache=True).cache
    with pytest.raises(ValueError, match=problem):
        model(tokens(1, 4), **options)


def test_assisted_generation_is_refused(hf):
    model = hf.CatForCausalLM.of(build(**ONE))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens(1, 4), assistant_model=model, max_new_tokens=2)


TEXT = "Line 1 of the têxt , with  <unk> x<eos> <eos> y\n\n\n    indented\tĀĊ Ġ \x00 zero<end>\r\n  \n  \nand 日本 ##o\n  the"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words", "few_words"])
def test_the_tokenizer_gives_every_text_the_same_tokens(hf, tmp_path, kind):
    training = np.frombuffer(f"the end of the text , with <eos> ##o y\n{TEXT}\n".encode() * 3, np.uint8)
    make = {"bytes": Bytes, "bpe": lambda: BPE.learn(training, 300), "words": lambda: Words.learn(training, None)}
    tokenizer = make.get(kind, lambda: Words.learn(training, 9))()
    hf.convert_tokenizer(tokenizer, tokenizer.size).save_pretrained(tmp_path)
    loaded = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = tokenizer.encode(np.frombuffer(TEXT.encode(), np.uint8)).tolist()
    assert loaded(TEXT)["input_ids"] == expected
    assert len(loaded) == tokenizer.size
    for count in range(len(expected) + 1):
        assert loaded.decode(expected[:count]) == "".join(tokenizer.decode(expected[:count]))
    short = len(loaded("the")["input_ids"])
    mask = loaded(["the", TEXT], padding=True, return_tensors="pt")["attention_mask"]
    assert mask[0].tolist() == [0] * (len(expected) - short) + [1] * short
    assert loaded.eos_token == ("<unk>" if "words" in kind else "Ā")
    assert "\n" in loaded.decode(expected, skip_special_tokens=True)


def test_without_a_tokenizer_a_text_is_numbers(hf, reload, tmp_path):
    model = reload(build(**ONE))
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    inputs = tokenizer(["3 17 255", "0"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[3, 17, 255], [256, 256, 0]]
    assert tokenizer.decode([3, 17, 255, 0], skip_special_tokens=True) == "3 17 255 0"
    found = model.generate(**inputs, do_sample=False, max_new_tokens=3)[1, 3:].tolist()
    assert found == [int(token) for token in generate(model.model, torch.zeros(1, 1, dtype=torch.long), 3)]
    with pytest.raises(Exception, match="Missing"):
        tokenizer("3 256")


def test_without_transformers_the_error_names_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cat.hf", raising=False)
    with pytest.raises(ImportError, match=r"^cat\.hf needs the package transformers, .* Fix: pip install 'cat-study\[hf\]'$"):
        importlib.import_module("cat.hf")


HARNESS = """
import functools, lm_eval.tasks, cat.hf
# Reading the list of the harness's own tasks takes ten seconds.
lm_eval.tasks.TaskManager.__init__ = functools.partialmethod(lm_eval.tasks.TaskManager.__init__, include_defaults=False)
cat.hf.main()
"""


def test_the_harness_scores_what_the_model_computes(hf, tmp_path):
    pytest.importorskip("accelerate", reason="the harness needs accelerate")
    model = build(length=64, **ONE)
    hf.save(model, tmp_path / "model", Bytes())
    options = [
        "--model",
        "cat",
        "--model_args",
        f"pretrained={tmp_path / 'model'},max_length=256",
        "--device",
        "cpu",
        "--batch_size",
        "8",
    ]
    tasks = ["--include_path", "examples/lm_eval", "--tasks", "cat_needles,cat_cloze,cat_choice,cat_perplexity"]
    files = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-c", HARNESS, *options, *tasks, *files],
        cwd=ROOT,
        env={**os.environ, **offline},
        check=True,
        timeout=300,
    )
    (results,) = (tmp_path / "out").glob("*/results_*.json")
    check_scores(
        model, json.loads(results.read_text())["results"], next((tmp_path / "out").glob("*/samples_cat_needles_*.jsonl"))
    )


def check_scores(model, results, needles):
    """Compare the results of the harness with those computed here, text by text."""

    def log_likelihood(context, text):
        tokens = torch.tensor([list((context + text).encode())])
        start = len(context.encode())
        logits = model(tokens)[0, start - 1 : -1].log_softmax(-1)
        chosen = tokens[0, start:]
        return logits.gather(1, chosen[:, None]).sum().item(), bool((logits.argmax(-1) == chosen).all())

    def rows(name):
        return [json.loads(line) for line in (ROOT / "examples" / "lm_eval" / f"{name}.jsonl").read_text().splitlines()]

    cloze = [log_likelihood(row["text"], f" {row['word']}") for row in rows("cloze")]
    assert results["cat_cloze"]["perplexity,none"] == pytest.approx(np.exp(-np.mean([score for score, _ in cloze])), rel=1e-3)
    assert results["cat_cloze"]["acc,none"] == np.mean([best for _, best in cloze])
    right = [
        np.argmax([log_likelihood(row["text"], f" {choice}")[0] for choice in row["choices"]]) == row["label"]
        for row in rows("choice")
    ]
    assert results["cat_choice"]["acc,none"] == pytest.approx(np.mean(right))
    texts = [row["text"] for row in rows("perplexity")]
    bits = -sum(log_likelihood("\n", text)[0] for text in texts) / np.log(2)
    assert results["cat_perplexity"]["bits_per_byte,none"] == pytest.approx(
        bits / sum(len(text.encode()) for text in texts), rel=1e-4
    )
    for line in needles.read_text().splitlines():
        sample = json.loads(line)
        prompt = torch.tensor([list(sample["doc"]["text"].encode())])
        text = "".join(Bytes().decode(int(token) for token in generate(model, prompt, 8)))
        assert sample["resps"] == [[re.split(r"[.\n\x00]", text)[0]]]


@pytest.mark.parametrize("missing", ["lm_eval", "accelerate"])
def test_without_the_harness_the_error_names_the_fix(hf, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lm_eval.models.huggingface", raising=False)
    with pytest.raises(SystemExit, match=rf"^cat\.hf: needs the package {missing}.*\. Fix: pip install 'cat-study\[eval\]'$"):
        hf.main()
