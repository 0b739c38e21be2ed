"""`python -m pipeline generate-text`: what follows upon a prompt is the model's own choice, in the letters of the text."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.commands.sample import SamplingOptions, _tokenizer, sample
from pipeline.config.grid import variants_on
from pipeline.config.load import load_study
from pipeline.stages import train
from pipeline.storage import runs
from pipeline.storage.paths import DATA
from tests.helpers.reference import naive_continuation
from tests.helpers.study import edit, stage, tiny_study

PROMPT = "Line 3 of the"


@pytest.fixture(scope="module", params=["bytes", "words"])
def trained(request, tmp_path_factory):
    """A study of two variants on a text of one's own, in bytes or in words."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "lines.txt").write_text(
        "".join(f"Line {i} of the têxt , with {'new' if i > 160 else 'old'}{i % 13}\n" for i in range(400))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "_splits", train._splits.__wrapped__)  # which knows a task by its name, whatever the folder
        tiny_study(folder, tasks=["copying", "text"])
        edit(**{"tasks.text.data.source": str(folder / "lines.txt"), "tasks.text.data.tokens": request.param, "seeds": [4]})
        edit(**{"variants.none.position": "learned"})
        stage("generate", "text")
        for variant in ("k", "none"):
            stage("train", "text", variant)
    return folder


@pytest.fixture
def study(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained.name.rstrip("0123456789")


def ask(*arguments, prompt=PROMPT, variant="k"):
    result = CliRunner().invoke(main, ["generate-text", "text", variant, *arguments], input=prompt)
    return result.exit_code, result.stdout, result.stderr


def text(*arguments, **options):
    code, out, err = ask(*arguments, **options)
    assert (code, err) == (0, "")
    return out


def test_the_most_likely_text_is_the_model_s_own_continuation(study):
    tokenizer = _tokenizer("text")
    read = tokenizer.encode(np.frombuffer(PROMPT.encode(), np.uint8)).tolist()
    model = runs.load_model(runs.weights_path("text", "k", 4))
    follows = naive_continuation(model, torch.tensor([read]), 9)[0].tolist()
    found = text("--tokens", "9", "--temperature", "0")
    assert found == "".join(tokenizer.decode(follows, after=read[-1])) + "\n"
    assert text("--tokens", "9", "--temperature", "0", "--prompt", PROMPT, prompt=None) == found
    assert text("--tokens", "9", "--top-k", "1") == text("--tokens", "9", "--temperature", "0", "--model-seed", "4") == found


def test_draws_are_those_of_the_seed(study):
    first, again, other = (text("--tokens", "20", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_text_comes_token_by_token(study):
    drawing = SamplingOptions(tokens=7, temperature=1.0, top_k=None, seed=0)
    read = []
    for part in sample(load_study(), "text", "k", PROMPT.encode(), drawing, model_seed=4, device="cpu"):
        read.append(part)
    assert len(read) == 7 + 1
    if study == "words":
        assert all(part.startswith((" ", "\n")) for part in read[: read.index("\n") if "\n" in read else 7])


def test_words_that_are_not_known_are_read_all_the_same(study):
    assert text("--tokens", "3", prompt="unheard-of wörds\n")


@pytest.mark.parametrize(
    ("arguments", "prompt", "line"),
    [
        (("text", "kk"), PROMPT, "params.yaml: variants.kk: is missing; did you mean 'k'?"),
        (("texts", "k"), PROMPT, "params.yaml: tasks.texts: is missing; did you mean 'text'?"),
        (("copying", "k"), PROMPT, "generate-text: copying is no text but of kind copying; a task of kind text is needed"),
        (("text", "k"), "", "generate-text: the prompt is empty; there must be something to go on with"),
        (("text", "k"), b"\xff\xfe", "generate-text: the prompt is no text in UTF-8"),
        (("text", "k", "--temperature", "nan"), PROMPT, "generate-text: temperature = nan must be a number from 0 on"),
        (("text", "k", "--device", "cuda"), PROMPT, "params.yaml: device = cuda: there is no such GPU here; use auto or cpu"),
        (
            ("text", "k", "--model-seed", "5"),
            PROMPT,
            "generate-text: runs/text/k/seed_5.safetensors: is missing; runs/text/k has seed_4; `dvc repro` trains the"
            " seeds of params.yaml",
        ),
        (
            ("text", "none", "--tokens", "40"),
            "Line",
            "generate-text: learned positions reach 32 tokens, not ",
        ),
    ],
)
def test_what_cannot_be_generated_ends_in_one_line(study, monkeypatch, arguments, prompt, line):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = CliRunner().invoke(main, ["generate-text", *arguments], input=prompt)
    assert (result.exit_code, result.stdout) == (2, "")
    (said,) = result.stderr.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize("option", [("--tokens", "0"), ("--temperature", "-0.5"), ("--top-k", "0"), ("--seed", "-1")])
def test_a_number_out_of_range_is_refused(study, option):
    code, out, err = ask(*option)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"Error: Invalid value for '{option[0]}': {option[1]} is not in the range")


def test_variants_that_the_study_does_not_train_on_the_task_are_named(study):
    others = [v for v in load_study().variants if v not in (these := variants_on(load_study(), "text"))]
    assert ask(variant=others[0]) == (
        2,
        "",
        f"generate-text: {others[0]} is not trained on text; these are: {', '.join(these)}\n",
    )


def test_data_that_are_not_there_or_others_are_told_of(study, tmp_path, monkeypatch):
    shutil.copytree(Path(), tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    other = "bytes" if study == "words" else "words"
    edit(**{"tasks.text.data.tokens": other})
    stage("generate", "text")
    code, _, err = ask()
    assert code == 2
    assert err.startswith("generate-text: runs/text/k/seed_4.safetensors: knows ")
    assert len(err.splitlines()) == 1
    shutil.rmtree(DATA / "text")
    assert ask() == (2, "", "generate-text: data/text is not there; run `dvc repro generate@text`\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_terminal_would_obey_is_shown_to_it_escaped(study, monkeypatch, capsys, terminal):
    told = "a\x1b[31m\r\x00é\u202e\t\n\x9b€\ufffd"
    monkeypatch.setattr("pipeline.commands.sample.generate_text", lambda *_, **__: iter([told]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    stage("generate-text", "text", "k", "--prompt", PROMPT)
    escaped = "a\\u001b[31m\\r\\u0000é\\u202e\t\n\\u009b€\ufffd"
    assert capsys.readouterr().out == (escaped if terminal else told) + "\n"
