"""A tokenizer as the metadata of a GGUF file.

Of a GGUF source every `tokenizer.*` key is kept. Of other sources the vocabulary is written from
the tokenizer: byte-level BPE from its `tokenizer.json`, SentencePiece from its `tokenizer.model`.
llama.cpp splits a text by a rule that it knows by name; the name is found by comparing how the
tokenizer splits a text of every kind of character, and a rule that is not found is refused, since a
wrong one would give other tokens without a word.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import TransActError
from transact_core.models.gguf_reader import read_gguf
from transact_core.models.gguf_tokenizer import (
    PRE_TOKENIZERS,
    SPECIAL_TOKENS,
    TokenType,
    splitter,
)

PROBE = (
    "Hello, world! 1 22 333 4444 55555 don't DON'T we'VE it's  x\u00a0y\t\tz\r\n\r\n \n  end   \n"
    "camelCaseWord HTTPServer a_b1c2 call();\ncall();\n\n foo/bar// "
    "x==y != z; $100+5% <tag> ~^|` ... (a|b),c?d! "
    '"quoted" Größe naïve ½ ² Ⅻ ٣٤٥ ЖЗИ привет i̇ 東京123, 一些中文字。ひらがなカタカナ 한국어 '
    "नमस्ते สวัสดี مرحبا 🎉👩‍👩‍👧 \u200b #!/usr  '' ''' ,.  9.81 −5 「」…"
)
"""A text on which the rules differ."""
TEMPLATE = "tokenizer.chat_template"
NORMALIZERS = (None, "NFC")
"""What a byte-level tokenizer may do to a text first; llama.cpp does nothing."""


@dataclass(frozen=True)
class Entry:
    """One entry of a GGUF file's metadata."""

    key: str
    value: Any
    kind: GGUFValueType
    items: GGUFValueType | None = None
    """The kind of an array's items."""


def vocabulary_of_file(path: Path) -> tuple[Entry, ...]:
    """Every `tokenizer.*` entry of a GGUF file."""
    return tuple(
        Entry(key, field.contents(), field.types[0], *field.types[1:])
        for key, field in read_gguf(path).fields.items()
        if key.startswith("tokenizer.")
    )


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    folder: Path | None = None,
    end_ids: tuple[int, ...] = (),
) -> tuple[Entry, ...]:
    """The entries of a tokenizer.

    Args:
        vocab_size: Rows of the embedding; ids without a token become unused ones.
        folder: Where the tokenizer was loaded from, for its `tokenizer.model`.
        end_ids: Tokens at which generation ends.

    Raises:
        TransActError: llama.cpp has no tokenizer that is known to give the same tokens.
    """
    if not tokenizer.is_fast:
        raise TransActError(
            "A tokenizer without tokenizer.json cannot be written into a GGUF file."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > vocab_size:
        raise TransActError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model embeddings for "
            f"{vocab_size:,}; llama.cpp refuses such a file."
        )
    if state["model"].get("type") != "BPE":
        raise TransActError(
            f"The tokenizer is of the kind {state['model'].get('type')}, which llama models of "
            "llama.cpp do not have; only byte-level BPE and SentencePiece BPE can be written."
        )
    if state["model"].get("byte_fallback"):
        entries = _sentencepiece(tokenizer, vocab_size, folder)
    else:
        entries = _byte_level(tokenizer, vocab_size, state)
    return (*entries, *_special(tokenizer, end_ids), *_template(tokenizer))


def _byte_level(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, state: dict[str, Any]
) -> Iterator[Entry]:
    yield _text("tokenizer.ggml.model", "gpt2")
    yield _text("tokenizer.ggml.pre", pre_tokenizer_name(tokenizer, state))
    tokens, kinds = _unused(vocab_size)
    for token, token_id in tokenizer.get_vocab().items():
        tokens[token_id], kinds[token_id] = token, TokenType.NORMAL
    _mark_added(tokenizer, tokens, kinds)
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]
    ]
    yield from _token_entries(tokens, kinds)
    if merges:
        yield Entry("tokenizer.ggml.merges", merges, GGUFValueType.ARRAY, GGUFValueType.STRING)


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> str:
    """The name under which llama.cpp knows how a byte-level tokenizer splits a text.

    Raises:
        TransActError: no known rule splits `PROBE` as the tokenizer does.
    """
    normalizer = (state.get("normalizer") or {}).get("type")
    own = tokenizer.backend_tokenizer.pre_tokenizer
    if own is not None and normalizer in NORMALIZERS:
        pieces = _pieces(own)
        whole_words = bool(state["model"].get("ignore_merges"))
        for name, rule in PRE_TOKENIZERS.items():
            same_words = rule.takes_whole_words == whole_words
            if same_words and _pieces(splitter(rule)) == pieces:
                return name
    raise TransActError(
        "The tokenizer splits texts by a rule that is not known to be one of llama.cpp's, so a "
        "GGUF file would give other tokens; nothing was written."
    )


def _pieces(pre_tokenizer: Any) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE)]


def _sentencepiece(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: Path | None
) -> Iterator[Entry]:
    path = folder / "tokenizer.model" if folder else None
    if path is None or not path.is_file():
        raise TransActError(
            "The scores of a SentencePiece vocabulary are in its tokenizer.model, which is not "
            "beside the weights; put it there to write a GGUF file."
        )
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:
        raise TransActError(f"{path} is not a SentencePiece model; it may be damaged.") from None
    if len(model.pieces) > vocab_size:
        raise TransActError(
            f"{path} has {len(model.pieces):,} tokens and the model embeddings for {vocab_size:,}."
        )
    yield _text("tokenizer.ggml.model", "llama")
    yield _text("tokenizer.ggml.pre", "default")
    tokens, kinds = _unused(vocab_size)
    scores = [-1000.0] * vocab_size  # as llama.cpp's converter gives tokens that were added
    for token_id, piece in enumerate(model.pieces):
        tokens[token_id], kinds[token_id] = piece.piece, TokenType(piece.type)
        scores[token_id] = piece.score
    for token_id, token in tokenizer.added_tokens_decoder.items():
        # Pieces that were there before keep what the model says of them.
        if token_id >= len(model.pieces):
            tokens[token_id] = token.content
            kinds[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    yield from _token_entries(tokens, kinds)
    yield Entry("tokenizer.ggml.scores", scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    yield _flag("tokenizer.ggml.add_space_prefix", prefix)


def _unused(vocab_size: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    return tokens, [TokenType.UNUSED] * vocab_size


def _mark_added(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], kinds: list[TokenType]
) -> None:
    for token_id, token in tokenizer.added_tokens_decoder.items():
        tokens[token_id] = token.content
        kinds[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED


def _token_entries(tokens: list[str], kinds: list[TokenType]) -> Iterator[Entry]:
    yield Entry("tokenizer.ggml.tokens", tokens, GGUFValueType.ARRAY, GGUFValueType.STRING)
    numbers = [int(kind) for kind in kinds]
    yield Entry("tokenizer.ggml.token_type", numbers, GGUFValueType.ARRAY, GGUFValueType.INT32)


def _special(tokenizer: PreTrainedTokenizerBase, end_ids: tuple[int, ...]) -> Iterator[Entry]:
    for name, key in SPECIAL_TOKENS.items():
        token = getattr(tokenizer, name, None)
        if token is not None:
            token_id = tokenizer.convert_tokens_to_ids(str(token))
            yield _number(f"tokenizer.ggml.{key}_token_id", token_id)
    turn_ends = [token_id for token_id in end_ids if token_id != tokenizer.eos_token_id]
    if turn_ends:
        yield _number("tokenizer.ggml.eot_token_id", turn_ends[0])
    ids = tokenizer("a", verbose=False)["input_ids"]
    for name, place in (("bos", 0), ("eos", -1)):
        own = getattr(tokenizer, f"{name}_token_id")
        added = len(ids) > 1 and own is not None and ids[place] == own
        yield _flag(f"tokenizer.ggml.add_{name}_token", added)


def _template(tokenizer: PreTrainedTokenizerBase) -> Iterator[Entry]:
    template = tokenizer.chat_template
    if isinstance(template, str):
        yield _text(TEMPLATE, template)
    elif isinstance(template, dict):
        if "default" in template:
            yield _text(TEMPLATE, template["default"])
        names = [name for name in template if name != "default"]
        if names:
            key = "tokenizer.chat_templates"
            yield Entry(key, names, GGUFValueType.ARRAY, GGUFValueType.STRING)
        for name in names:
            yield _text(f"{TEMPLATE}.{name}", template[name])


def _text(key: str, value: str) -> Entry:
    return Entry(key, value, GGUFValueType.STRING)


def _number(key: str, value: int) -> Entry:
    return Entry(key, int(value), GGUFValueType.UINT32)


def _flag(key: str, value: bool) -> Entry:
    return Entry(key, bool(value), GGUFValueType.BOOL)
