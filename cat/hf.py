"""Models of the study in the Hugging Face library: load, generate, fine-tune, save; and evaluate with lm-evaluation-harness.

    import cat.hf  # registers the model type `cat`
    model = AutoModelForCausalLM.from_pretrained(folder)  # of `python -m pipeline export`, or of `save_pretrained`

`python -m cat.hf OPTIONS` is the command `lm_eval OPTIONS` with these models: see docs/layer.md. This is the only module that
imports transformers, an optional package.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

try:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedTokenizerFast
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
except ImportError as error:
    problem = "cat.hf needs the package transformers, 5.24 or newer. Fix: pip install 'cat-study[hf]'"
    raise ImportError(problem, name=error.name) from error

from cat.config import ModelConfig
from cat.mixers.base import Cache
from cat.mixers.registry import model_config, read_model
from cat.model import SequenceModel
from cat.tasks.tokenizer import BPE, END_OF_LINE, UNKNOWN, Bytes, Tokenizer, Words
from cat.types import Tokens


class CatConfig(PreTrainedConfig):
    """Configuration of a `CatForCausalLM`, saved as config.json.

    Raises ValueError if `model` is no configuration of a model, or cannot be trained at `training_length`.
    """

    model_type = "cat"
    keys_to_ignore_at_inference = ("cache",)
    model: dict[str, Any] | None = None
    """All settings of the model, as `ModelConfig.model_dump` writes them; None: one layer of attention with 64 channels."""
    vocab_size: int = 256
    training_length: int = 128
    """Tokens of the training sequences. Models without learned positions also read longer ones."""

    def __post_init__(self, **others: Any) -> None:
        config = model_config(mixer="attention", width=64, layers=1, heads=1) if self.model is None else read_model(self.model)
        config.check_length(self.training_length)
        self.model = config.model_dump(mode="json")
        super().__post_init__(**{**others, "tie_word_embeddings": config.tied})

    @property
    def study(self) -> ModelConfig:
        """The configuration of the study."""
        return read_model(self.model or {})

    @property
    def hidden_size(self) -> int:
        return self.study.width

    @property
    def num_hidden_layers(self) -> int:
        return self.study.layers

    @property
    def max_position_embeddings(self) -> int:
        """The training length: the context that tools use unless told otherwise."""
        return self.training_length


class CatCache:
    """The caches of all layers, which `generate` passes from one token to the next."""

    is_linear = (False,)  # `generate` cuts the inputs of a cache that counts its tokens
    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self.layers: list[Cache] = []

    def get_seq_length(self) -> int:
        """Tokens so far, with those of the padding."""
        return self.layers[0].length if self.layers else 0

    def reorder_cache(self, beam_idx: Int[Tensor, " N"]) -> None:
        """Keep the rows `beam_idx` of the batch: the beams that continue."""
        self.layers = [cache.reorder(beam_idx) for cache in self.layers]


class CatForCausalLM(PreTrainedModel, GenerationMixin):
    """A `SequenceModel`, `model`, with the interface of transformers."""

    config_class = CatConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _is_stateful = True  # tokens cannot be taken back from a recurrent state, as assisted generation would
    _tied_weights_keys = {"model.head.weight": "model.embedding.token.weight"}  # noqa: RUF012  as in the parent class

    def __init__(self, config: CatConfig):
        super().__init__(config)
        self.model = SequenceModel(config.study, vocabulary=config.vocab_size, length=config.training_length)
        self.post_init()

    @classmethod
    def of(cls, model: SequenceModel) -> CatForCausalLM:
        """Wrap a model; the weights are shared, not copied."""
        vocabulary = model.embedding.token.num_embeddings
        config = CatConfig(model=model.config.model_dump(mode="json"), vocab_size=vocabulary, training_length=model.length)
        with torch.device("meta"):
            wrapper = cls(config)
        wrapper.model = model
        return wrapper.train(model.training)

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: CatCache | None = None,
        labels: Tokens | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the logits (B, L, V); with `labels` (B, L) also the loss, in nats per token.

        `labels` are the input tokens, or -100 for no loss: label t + 1 is the target of token t. Padding and
        the first token of a document have no loss. With `use_cache`, `input_ids` continue the sequence of `cache`, which is
        updated, or start a new one.

        `attention_mask` (B, L) is 0 at padding, on the left or on the right of a row; padding may be any integers. Only a prompt
        has padding: after a cache, the mask (B, cached + L) has none in its last L columns. `segment_ids` (B, L) are integers,
        one for each document of a row. `logits_to_keep`: how many logits, counted from the end, or their positions; 0: all.

        Raises ValueError if a sequence is longer than the learned positions, or if a mask is none of these.
        """
        if cache is not None or use_cache:
            if segment_ids is not None:
                raise ValueError("segment_ids need whole sequences, without a cache")
            cache = CatCache() if cache is None else cache
            hidden = self._continue(
                input_ids, attention_mask, cache, last=isinstance(logits_to_keep, int) and logits_to_keep == 1
            )
        else:
            hidden = self.model.hidden(input_ids, attention_mask=attention_mask, segment_ids=segment_ids)
        logits = self.model.head(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            labels = _labels_within_documents(labels, attention_mask, segment_ids)
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output.to_tuple() if return_dict is False else output

    def _continue(self, tokens: Tokens, mask: Tensor | None, cache: CatCache, *, last: bool) -> Float[Tensor, "B _ D"]:
        """Return the inputs of the head for tokens that continue `cache`, and update it."""
        if cache.layers and mask is not None:
            length = cache.get_seq_length() + tokens.shape[1]
            if mask.shape != (len(tokens), length):
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}, not {(len(tokens), length)}: with the cached tokens"
                )
            # `generate` has just chosen a single token; reading its mask would wait for the device at each token.
            if tokens.shape[1] > 1 and not mask[:, -tokens.shape[1] :].all():
                raise ValueError("attention_mask has padding after cached tokens: only a prompt has padding")
            mask = None
        hidden, cache.layers = self.model.hidden_step(tokens, cache.layers, mask, last=last)
        return hidden

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding.token

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def init_weights(self) -> None:
        """Tie the weights; a `SequenceModel` has initialized itself."""
        self.tie_weights(recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the weights of a module that a saved model lacks, and keep those that it has."""
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = [(tensor, tensor.detach().clone()) for tensor in own if getattr(tensor, "_is_hf_initialized", False)]
        if own:
            cast(Any, module).reset_parameters()
        for tensor, value in loaded:
            tensor.data.copy_(value)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`forward` makes the cache: layers keep other states than keys and values."""
        return False


def _labels_within_documents(labels: Tokens, mask: Tensor | None, segments: Tensor | None) -> Tokens:
    """Replace by -100 the labels of padding, and those that a token of padding or of another document would predict."""
    if mask is not None:
        padding = mask[:, -labels.shape[1] :] == 0
        labels = labels.masked_fill(padding | F.pad(padding, (1, -1)), -100)
    if segments is not None:
        labels = labels.masked_fill(F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)), -100)
    return labels


def save(model: SequenceModel, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Save a model of the study and its tokenizer in the format of transformers.

    Without a tokenizer, as in a synthetic task, a text is token numbers separated by spaces.
    """
    vocabulary = model.embedding.token.num_embeddings
    converted = convert_tokenizer(tokenizer, vocabulary)
    wrapper = CatForCausalLM.of(model)
    start = None if tokenizer is None else converted.encode("\n")[-1]  # lines follow line ends: the token before a text is one
    wrapper.generation_config = GenerationConfig(bos_token_id=start, pad_token_id=converted.pad_token_id)
    wrapper.save_pretrained(folder)
    converted.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # the weights are written for their owner only


def convert_tokenizer(tokenizer: Tokenizer | None, vocabulary: int) -> PreTrainedTokenizerFast:
    """Convert a tokenizer of the study; the result gives every text the same tokens.

    Texts never contain its special tokens: an end-of-text token `eos_token` that is also padding. It is the byte 0 if there are
    bytes. Of words it is the unknown word. Without a tokenizer, a text is token numbers, and it is one more token.
    """
    library, end = _library_tokenizer(tokenizer, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=end,
        pad_token=end,
        unk_token=UNKNOWN if isinstance(tokenizer, Words) else None,
        padding_side="left",
        split_special_tokens=True,  # a text that spells a special token is only a text
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _library_tokenizer(tokenizer: Tokenizer | None, vocabulary: int) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of the `tokenizers` library, and its end-of-text token."""
    letters = bytes_to_unicode()
    if isinstance(tokenizer, Bytes):
        library = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        return library, letters[0]
    if isinstance(tokenizer, BPE):
        library = tokenizers.Tokenizer.from_str(tokenizer.save())
        # The study encodes each line separately.
        cut = pre_tokenizers.Split("\n", "merged_with_previous")
        library.pre_tokenizer = pre_tokenizers.Sequence([cut, library.pre_tokenizer])
        return library, letters[0]
    if tokenizer is None:
        numbers = {str(token): token for token in range(vocabulary)}
        library = tokenizers.Tokenizer(models.WordLevel(numbers, unk_token="<none>"))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return library, "<end>"
    saved = tokenizer.save()
    assert saved is not None  # only bytes have no file
    library = tokenizers.Tokenizer.from_str(saved)
    # One space between words: no word has one, so none starts with the prefix of a piece that follows without a space.
    words = decoders.WordPiece(prefix=" ", cleanup=False)
    lines = decoders.Replace(tokenizers.Regex(f" ?(?<![^ ]){END_OF_LINE}(?![^ ]) ?"), "\n")
    library.decoder = decoders.Sequence([words, decoders.Fuse(), lines])
    return library, UNKNOWN


def main() -> None:
    """Run lm-evaluation-harness. `--model cat` is its `hf` for texts without context, which here start after a line end."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        sys.exit(f"cat.hf: needs the package {error.name}. Fix: pip install 'cat-study[eval]'")

    @register_model("cat")
    class CatLM(HFLM):
        def __init__(self, **options: Any):
            super().__init__(**{"backend": "causal", **options})

        @property
        def prefix_token_id(self) -> int:
            start = self.model.generation_config.bos_token_id
            return super().prefix_token_id if self.custom_prefix_token_id is not None or start is None else start

    cli_evaluate()


AutoConfig.register(CatConfig.model_type, CatConfig)
AutoModelForCausalLM.register(CatConfig, CatForCausalLM)

if __name__ == "__main__":
    main()
