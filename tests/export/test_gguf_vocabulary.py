"""Tokenizers written as GGUF metadata give the same tokens when they are read again."""

import json

import pytest
import sentencepiece
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tests.conftest import VOCAB_SIZE, make_tokenizer
from transact_core.base.errors import TransActError
from transact_core.data.corpus import read_corpus
from transact_core.export.gguf_vocabulary import (
    PROBE,
    pre_tokenizer_name,
    vocabulary_of,
    vocabulary_of_file,
)
from transact_core.models.gguf_tokenizer import PRE_TOKENIZERS, splitter, tokenizer_from_metadata
from transact_core.models.load import builtin_gguf, load_model

TEXT = read_corpus("builtin").text[20_000:24_000] + PROBE


def values(entries) -> dict:
    return {entry.key: entry.value for entry in entries}


def state_of(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_the_probe_tells_the_rules_apart():
    rules = {rule.splits for rule in PRE_TOKENIZERS.values()}
    pieces = {
        tuple(piece for piece, _ in splitter(rule).pre_tokenize_str(PROBE))
        for rule in PRE_TOKENIZERS.values()
    }
    assert len(pieces) == len(rules)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_rule_of_a_tokenizer_is_found(name):
    tokenizer = make_tokenizer()
    rule = PRE_TOKENIZERS[name]
    tokenizer.backend_tokenizer.pre_tokenizer = splitter(rule)
    state = state_of(tokenizer)
    state["model"]["ignore_merges"] = rule.takes_whole_words
    found = PRE_TOKENIZERS[pre_tokenizer_name(tokenizer, state)]
    assert (found.splits, found.takes_whole_words) == (rule.splits, rule.takes_whole_words)


def test_an_unknown_rule_is_told_and_not_guessed():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r".{7}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(TransActError, match="not known to be one of llama"):
        vocabulary_of(tokenizer, VOCAB_SIZE)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TransActError, match="not known to be one of llama"):
        vocabulary_of(tokenizer, VOCAB_SIZE)


def test_more_tokens_than_embeddings_are_refused(tokenizer):
    with pytest.raises(TransActError, match="refuses such a file"):
        vocabulary_of(tokenizer, VOCAB_SIZE - 1)


def test_a_byte_level_tokenizer_is_read_again_as_it_was():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.add_tokens(["naïve"])
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    entries = values(vocabulary_of(tokenizer, VOCAB_SIZE + 9, end_ids=(1, VOCAB_SIZE)))
    assert len(entries["tokenizer.ggml.tokens"]) == VOCAB_SIZE + 9
    assert entries["tokenizer.ggml.add_bos_token"] is False
    assert entries["tokenizer.ggml.eot_token_id"] == VOCAB_SIZE
    again = tokenizer_from_metadata(entries)
    text = TEXT + " <tool> naïve</s>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_a_sentencepiece_tokenizer_is_read_again_as_it_was(tmp_path):
    (tmp_path / "text.txt").write_text(read_corpus("builtin").text[:30_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path, legacy=False, add_bos_token=True)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    entries = values(vocabulary_of(tokenizer, 408, tmp_path))
    assert entries["tokenizer.ggml.model"] == "llama"
    assert entries["tokenizer.ggml.add_bos_token"] is True
    again = tokenizer_from_metadata(entries)
    # Before a text that begins with a space, llama.cpp puts one more.
    text = read_corpus("builtin").text[20_000:24_000].strip()
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    with pytest.raises(TransActError, match=r"tokenizer\.model"):
        vocabulary_of(tokenizer, 408, tmp_path / "elsewhere")


@pytest.mark.builtin
def test_the_built_in_models_vocabulary_is_that_of_its_file(converted_builtin):
    loaded = load_model("builtin")
    kept = values(vocabulary_of_file(builtin_gguf()))
    made = values(vocabulary_of(loaded.tokenizer, loaded.architecture.vocab_size, loaded.folder))
    assert kept.keys() - made.keys() == {"tokenizer.ggml.add_space_prefix"}
    assert {key: made[key] for key in kept.keys() & made.keys()} == {
        key: value for key, value in kept.items() if key in made
    }
