"""Tokenizers made of a GGUF file's metadata.

tests/trust/test_llama_cpp_tokens.py compares their ids with llama.cpp's; here is what must hold
without it.
"""

import io
import json

import gguf
import pytest
import sentencepiece
from transformers import AutoTokenizer

from tests.conftest import VOCAB_SIZE, make_model
from tests.models.test_load import WIDE, refuse, write_gguf
from transact_core.models.gguf_tokenizer import (
    PRE_TOKENIZERS,
    TokenType,
    pre_tokenizer_notice,
    tokenizer_from_metadata,
    write_sentencepiece_model,
)
from transact_core.models.load import load_model

TEXT = "don't pay 12345 or 3½"


def byte_level(tokenizer, **changes) -> dict:
    """The metadata that a GGUF file of a byte-level tokenizer holds."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token in ("<s>", "</s>") else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in stored["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def pieces(name, tokenizer, text=TEXT) -> list[str]:
    backend = tokenizer_from_metadata(byte_level(tokenizer, pre=name)).backend_tokenizer
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", "don 't Ġpay Ġ12345 Ġor Ġ3Â½"),
        ("smollm", "don 't Ġpay Ġ 1 2 3 4 5 Ġor Ġ 3 Â½"),
        ("llama-bpe", "don 't Ġpay Ġ 123 45 Ġor Ġ 3Â½"),
        ("qwen2", "don 't Ġpay Ġ 1 2 3 4 5 Ġor Ġ 3 Â½"),
        ("tekken", "don 't Ġpay Ġ 1 2 3 4 5 Ġor Ġ 3 Â½"),
        ("deepseek-llm", "don ' t Ġpay Ġ 12345 Ġor Ġ 3Â½"),
        ("default", "don ' t Ġpay Ġ 123 45 Ġor Ġ 3Â½"),
        (None, "don ' t Ġpay Ġ 123 45 Ġor Ġ 3Â½"),
    ],
)
def test_texts_are_split_as_the_named_rule_does(tokenizer, name, expected):
    assert pieces(name, tokenizer) == expected.split(" ")


def test_an_unknown_rule_is_said(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    assert pre_tokenizer_notice(path, byte_level(tokenizer, pre="smollm")) is None
    assert "names the pre-tokenizer new" in pre_tokenizer_notice(
        path, byte_level(tokenizer, pre="new")
    )
    assert "does not name its pre-tokenizer" in pre_tokenizer_notice(
        path, byte_level(tokenizer, pre=None)
    )


def test_the_notice_is_given_at_each_load(tokenizer, tmp_path):
    path = write_gguf(
        tmp_path / "new.gguf",
        make_model(**WIDE),
        tokenizer,
        metadata={"tokenizer.ggml.pre": "brand-new"},
    )
    for _ in range(2):
        (notice,) = load_model(str(path)).notices
        assert "names the pre-tokenizer brand-new, which is not known here" in notice


def test_a_whole_word_is_taken_before_merges_where_the_model_does(tokenizer):
    """Llama 3 has tokens that its merges do not reach."""
    metadata = byte_level(tokenizer, pre="llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqzqx"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    assert tokenizer_from_metadata(metadata)("zqzqx")["input_ids"] == [VOCAB_SIZE]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert len(tokenizer_from_metadata(metadata)("zqzqx")["input_ids"]) > 1


@pytest.mark.parametrize(
    ("pre", "stated", "has_bos"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("smollm", None, False),
        ("smollm", True, True),
    ],
)
def test_a_text_begins_with_bos_where_llama_cpp_begins_it_so(tokenizer, pre, stated, has_bos):
    ids = tokenizer_from_metadata(byte_level(tokenizer, pre=pre, add_bos_token=stated))("fish")
    assert (ids["input_ids"][0] == 0) == has_bos


def test_control_tokens_beyond_the_byte_alphabet_keep_their_ids(tokenizer):
    """transformers' reader takes DeepSeek's for text, and adds them beyond the embedding."""
    begin = "<｜begin▁of▁sentence｜>"
    metadata = byte_level(tokenizer, bos_token_id=VOCAB_SIZE)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], begin, "<think>"]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = [*types, TokenType.CONTROL, TokenType.USER_DEFINED]
    made = tokenizer_from_metadata(metadata)
    assert (made.bos_token, made.bos_token_id, len(made)) == (begin, VOCAB_SIZE, VOCAB_SIZE + 2)
    ids = made(f"{begin}one<think>")["input_ids"]
    assert (ids[0], ids[-1]) == (VOCAB_SIZE, VOCAB_SIZE + 1)
    assert made.decode(ids) == f"{begin}one<think>"
    assert made.decode(ids, skip_special_tokens=True) == "one<think>"


def test_no_special_tokens_are_made_up(tokenizer):
    metadata = byte_level(tokenizer, bos_token_id=None, eos_token_id=10**9)
    made = tokenizer_from_metadata(metadata)
    assert made.bos_token is None
    assert made.eos_token is None
    assert len(made) == VOCAB_SIZE


def test_all_chat_templates_are_kept(tokenizer):
    metadata = byte_level(tokenizer) | {
        "tokenizer.chat_template": "default",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    expected = {"default": "default", "tool_use": "tools"}
    assert tokenizer_from_metadata(metadata).chat_template == expected
    del metadata["tokenizer.chat_templates"]
    assert tokenizer_from_metadata(metadata).chat_template == "default"


def test_other_kinds_of_tokenizers_are_refused(tokenizer, tmp_path, monkeypatch):
    honest = gguf.GGUFWriter.add_tokenizer_model
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", lambda self, _: honest(self, "t5"))
    path = write_gguf(tmp_path / "t5.gguf", make_model(**WIDE), tokenizer)
    refuse(path, "a tokenizer of the kind t5; only gpt2 and llama")


# --- SentencePiece -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces_of_sentencepiece():
    """A SentencePiece model with 256 byte pieces."""
    place = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(f"one fish two fish number {number}" for number in range(300)),
        model_writer=place,
        model_type="bpe",
        vocab_size=318,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=place.getvalue())


def metadata_of(pieces, **changes) -> dict:
    count = range(pieces.GetPieceSize())

    def kind(piece_id: int) -> int:
        if pieces.IsByte(piece_id):
            return TokenType.BYTE
        if pieces.IsUnknown(piece_id):
            return TokenType.UNKNOWN
        return TokenType.CONTROL if pieces.IsControl(piece_id) else TokenType.NORMAL

    metadata = {
        "model": "llama",
        "tokens": [pieces.IdToPiece(piece_id) for piece_id in count],
        "scores": [pieces.GetScore(piece_id) for piece_id in count],
        "token_type": [kind(piece_id) for piece_id in count],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize("text", ["one fish", " two  fish 123\n", "Größe 東京\tx", "▁", ""])
def test_sentencepiece_ids_are_those_of_sentencepiece(pieces_of_sentencepiece, text):
    made = tokenizer_from_metadata(metadata_of(pieces_of_sentencepiece))
    ids = made(text)["input_ids"]
    assert ids == [1, *pieces_of_sentencepiece.Encode(text)]
    assert made.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


def test_a_prefix_space_is_added_only_where_the_file_says_so(pieces_of_sentencepiece):
    made = tokenizer_from_metadata(metadata_of(pieces_of_sentencepiece, add_space_prefix=False))
    tokens = made.convert_ids_to_tokens(made("fish")["input_ids"])
    assert "".join(tokens) == "<s>fish"
    assert made.decode(made(" fish")["input_ids"], skip_special_tokens=True) == " fish"


def test_a_converted_file_has_a_sentencepiece_model_that_an_export_keeps(
    pieces_of_sentencepiece, tokenizer, tmp_path, monkeypatch
):
    from transact_core.export.tokenizer_files import save_tokenizer

    metadata = metadata_of(pieces_of_sentencepiece)
    monkeypatch.setattr("transact_core.models.gguf._tokenizer_metadata", lambda *_, **__: metadata)
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    # Only the tokenizer is of another kind than the file says.
    path = write_gguf(tmp_path / "sentencepiece.gguf", make_model(**WIDE), tokenizer)
    loaded = load_model(str(path))
    output = tmp_path / "out"
    output.mkdir()
    save_tokenizer(loaded.tokenizer, output, loaded.folder)
    kept = sentencepiece.SentencePieceProcessor(str(output / "tokenizer.model"))
    text = " two  fish 123\n Größe"
    expected = pieces_of_sentencepiece.Encode(text)
    assert kept.Encode(text) == expected
    assert AutoTokenizer.from_pretrained(output)(text)["input_ids"] == [1, *expected]


def test_tokens_of_an_undefined_type_are_written_as_normal(pieces_of_sentencepiece, tmp_path):
    metadata = metadata_of(pieces_of_sentencepiece)
    types = metadata["tokenizer.ggml.token_type"]
    types[-1], types[-2] = 0, 9
    write_sentencepiece_model(metadata, tmp_path / "tokenizer.model")
    written = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = " two  fish 123"
    assert written.Encode(text) == pieces_of_sentencepiece.Encode(text)


def test_every_rule_is_one_that_the_tokenizers_library_can_carry_out(tokenizer):
    for name in PRE_TOKENIZERS:
        assert "".join(pieces(name, tokenizer, "a1 b\n\n  c!")) == "a1ĠbĊĊĠĠc!"
