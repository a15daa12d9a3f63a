"""The tokenizer of an export: the fields of both versions of transformers, the files of the source."""

import json
import os

import pytest
import sentencepiece
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tests.conftest import make_model, make_tokenizer
from transact_core.base.errors import TransActError
from transact_core.export.tokenizer_files import save_tokenizer
from transact_core.models.load import load_model

TEXT = "Hello <|im_start|>user 1 22 333\nGröße\t東京  <think> end"


def config_of(folder) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


@pytest.fixture
def chatty():
    """A tokenizer with extra special tokens, an added token and a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.padding_side = "left"
    return tokenizer


def test_both_versions_know_class_and_fields(chatty, tmp_path):
    save_tokenizer(chatty, tmp_path)
    config = config_of(tmp_path)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config  # version 4 takes a mapping there, and fails
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    added = {token["content"] for token in config["added_tokens_decoder"].values()}
    assert added == {"<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>"}
    # Version 4's default has token_type_ids, which generate() refuses.
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["padding_side"] == "left"
    assert not {"is_local", "local_files_only", "backend"} & config.keys()


def test_version_5_reads_the_same_tokenizer(chatty, tmp_path, capfd):
    save_tokenizer(chatty, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = chatty(TEXT)["input_ids"]
    assert again(TEXT)["input_ids"] == ids
    assert again.decode(ids) == chatty.decode(ids)
    assert sorted(again.all_special_tokens) == sorted(chatty.all_special_tokens)
    assert again.padding_side == "left"
    assert again.chat_template == chatty.chat_template
    assert again.backend_tokenizer.to_str() == chatty.backend_tokenizer.to_str()
    assert capfd.readouterr().err == ""


def test_a_prefix_space_is_named_as_the_pre_tokenizer_has_it(tmp_path):
    """Version 4 changes a pre-tokenizer that does not agree with the field."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    save_tokenizer(tokenizer, tmp_path)
    assert config_of(tmp_path)["add_prefix_space"] is True


# --- SentencePiece -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_source(tmp_path_factory):
    """A checkpoint with a `tokenizer.model` alone, as the first LLaMA models had it."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = [f"one fish two fish number {number}" for number in range(300)]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=318,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    make_model().save_pretrained(folder)
    added = {318: "<|im_start|>", 319: "<|im_end|>"}
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True} | flags for i, token in added.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    stale = {"bos_token": "</s>", "eos_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(stale))
    return folder


def exported(folder, output):
    """Loads a model's tokenizer as the program does and saves it as an export does."""
    loaded = load_model(str(folder))
    assert loaded.folder == folder
    output.mkdir()
    save_tokenizer(loaded.tokenizer, output, loaded.folder)
    return loaded.tokenizer


def test_the_sentencepiece_model_is_kept(sentencepiece_source, tmp_path):
    tokenizer = exported(sentencepiece_source, tmp_path / "out")
    kept = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert kept == (sentencepiece_source / "tokenizer.model").read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again("fish")["input_ids"][0] == again.bos_token_id


def test_added_tokens_stand_where_converters_look_for_them(sentencepiece_source, tmp_path):
    exported(sentencepiece_source, tmp_path / "out")
    added = config_of(tmp_path / "out")["added_tokens_decoder"]
    assert (added["318"]["content"], added["319"]["content"]) == ("<|im_start|>", "<|im_end|>")


def test_what_transformers_writes_wins_over_stale_files(sentencepiece_source, tmp_path):
    tokenizer = exported(sentencepiece_source, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert (stored["bos_token"], stored["eos_token"]) == ("<s>", "</s>")
    assert stored == tokenizer.special_tokens_map


def test_a_sentencepiece_model_of_another_vocabulary_is_not_kept(
    sentencepiece_source, checkpoint, tmp_path
):
    stale = (sentencepiece_source / "tokenizer.model").read_bytes()
    (checkpoint / "tokenizer.model").write_bytes(stale)
    exported(checkpoint, tmp_path / "out")
    assert "tokenizer.model" not in os.listdir(tmp_path / "out")


def test_what_is_no_sentencepiece_model_is_not_kept(checkpoint, tmp_path):
    (checkpoint / "tokenizer.model").write_bytes(b"aGVsbG8= 0\n")
    exported(checkpoint, tmp_path / "out")
    assert "tokenizer.model" not in os.listdir(tmp_path / "out")


def test_vocabulary_and_merges_are_kept_where_they_agree(checkpoint, tmp_path):
    stored = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (checkpoint / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (checkpoint / "merges.txt").write_text("\n".join(" ".join(m) for m in stored["merges"]))
    exported(checkpoint, tmp_path / "out")
    assert {"vocab.json", "merges.txt"} <= set(os.listdir(tmp_path / "out"))
    (checkpoint / "vocab.json").write_text(json.dumps({"fish": 5}))
    exported(checkpoint, tmp_path / "again")
    assert not {"vocab.json", "merges.txt"} & set(os.listdir(tmp_path / "again"))


def test_files_outside_the_source_are_not_copied(sentencepiece_source, tmp_path):
    from transact_core.models.checkpoint_folder import own_files

    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "LICENSE").symlink_to(sentencepiece_source / "tokenizer.model")
    (folder / "NOTICE").write_text("ours")
    assert own_files(folder, folder.iterdir()) == [folder / "NOTICE"]


def test_a_source_that_was_removed_meanwhile_is_an_error(chatty, tmp_path):
    """Without its tokenizer.model, llama.cpp would tokenise texts differently."""
    with pytest.raises(TransActError, match=r"was removed meanwhile.*load the model again"):
        save_tokenizer(chatty, tmp_path, tmp_path / "gone")
