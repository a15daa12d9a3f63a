"""The tokenizer that a GGUF file describes, with llama.cpp's token ids.

A GGUF file holds a vocabulary, merges or scores, and the name of the rule by which a text is split
before tokens are merged (`tokenizer.ggml.pre`). transformers' reader knows few of those names and
falls back to GPT-2's rule without a warning; it also drops that some vocabularies take a whole word
before any merge, and that some begin each text with a token of their own. The rules below are those
of llama.cpp (`llama-vocab.cpp`), checked against it for each name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
SINGLE_DIGITS = (r"\p{N}", *GPT2)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",)
QWEN2 = (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}",)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (rf"{_CASED}|{_CAPITALS}|\p{{N}}|{_REST_WITH_SLASH}",)
GPT4O = (
    rf"{_CASED}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",
)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *GPT2, r"[0-9][0-9][0-9]")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
BLOOM = (r" ?[^(\s|.,!?…。，、।۔،)]+",)
VIKING = (*BLOOM, r"\p{N}")
SEED_CODER = (
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_EAST_ASIAN = r"[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")
# The model's own rule lists the cased letters of an older Unicode one by one.
DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _EAST_ASIAN,
    r"\p{N}+",
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp treats a text under one name of `tokenizer.ggml.pre`."""

    splits: tuple[str, ...]
    """Regular expressions, applied one after the other; matches and gaps become pieces."""
    takes_whole_words: bool = False
    """Whether a piece that is a token is taken as it is, before any merge (`ignore_merges`)."""
    adds_bos: bool = False
    """Whether a text begins with the BOS token where the file does not say."""


_LLAMA3 = PreTokenizer(LLAMA3, takes_whole_words=True, adds_bos=True)
_SINGLE_DIGITS = PreTokenizer(SINGLE_DIGITS)
_GPT2 = PreTokenizer(GPT2)
_QWEN2 = PreTokenizer(QWEN2)
_GPT4O = PreTokenizer(GPT4O)
_BLOOM = PreTokenizer(BLOOM)
_DEFAULT = PreTokenizer(DEFAULT)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(LLAMA3)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _SINGLE_DIGITS,
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"),
        _GPT2,
    ),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "kormo"),
        _QWEN2,
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _BLOOM),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), PreTokenizer(DEEPSEEK3)),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
    "seed-coder": PreTokenizer(SEED_CODER),
    "tekken": PreTokenizer(TEKKEN, takes_whole_words=True, adds_bos=True),
    "falcon": PreTokenizer(FALCON),
    "viking": PreTokenizer(VIKING),
}
"""By the name in `tokenizer.ggml.pre`; names that are missing belong to other architectures than
`llama`. Of `tekken` and `gpt-4o` this is the models' own rule, which llama.cpp approximates for
letters without case."""


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`, which are those of SentencePiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # llama.cpp's spelling
    "mask_token": "mask",
}
"""Part of the key `tokenizer.ggml.…_token_id` of each special token, by transformers' name."""
SPACE = "▁"
"""What SentencePiece writes for a space."""


def pre_tokenizer_notice(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """A notice where the file does not say how texts are split, or names a rule unknown here."""
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = metadata.get("tokenizer.ggml.pre")
    if name in PRE_TOKENIZERS:
        return None
    said = "does not name its pre-tokenizer" if name is None else f"names the pre-tokenizer {name}"
    return (
        f"{path.name} {said}{'' if name is None else ', which is not known here'}; texts are split "
        "by llama.cpp's default rule, so token ids may differ from those the model was trained on."
    )


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Args:
        metadata: values by key, of which those beginning with `tokenizer.` are read.

    Raises:
        KeyError: the vocabulary lacks its merges or scores.
    """
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = list(metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens))
    if metadata["tokenizer.ggml.model"] == "gpt2":
        pre_tokenizer = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre"), _DEFAULT)
        backend = _byte_level_bpe(metadata, tokens, pre_tokenizer)
        adds_bos = pre_tokenizer.adds_bos
    else:
        backend = _sentencepiece_bpe(metadata, tokens, types)
        adds_bos = True
    control, other = [], []
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == TokenType.CONTROL and token:
            control.append(AddedToken(token, normalized=False, special=True))
        if token_type == TokenType.USER_DEFINED and token:
            other.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(other)
    special = {
        name: tokens[token_id]
        for name, key in SPECIAL_TOKENS.items()
        if (token_id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
        and 0 <= token_id < len(tokens)
    }
    # transformers would add tokens of its own for these two where they are not given.
    defaults = {"bos_token": None, "eos_token": None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(metadata),
        **defaults | special,
    )


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: list[str], pre_tokenizer: PreTokenizer
) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        # The first character may itself be a space.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if {left, right, left + right} <= vocabulary.keys():
            merges.append((left, right))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre_tokenizer.takes_whole_words)
    )
    backend.pre_tokenizer = splitter(pre_tokenizer)
    backend.decoder = decoders.ByteLevel()
    return backend


def splitter(rule: PreTokenizer) -> pre_tokenizers.Sequence:
    """What splits a text by a rule, and writes each piece in the letters of byte-level BPE."""
    # The ByteLevel step has the last rule of GPT-2 built in.
    ends_as_gpt2 = rule.splits[-1:] == GPT2
    splits = rule.splits[:-1] if ends_as_gpt2 else rule.splits
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=ends_as_gpt2),
        ]
    )


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=False))
    merged = {
        token
        for token, token_type in zip(tokens, types, strict=False)
        if token_type == TokenType.NORMAL
    }
    merges = generate_merges(vocabulary, scores, skip_tokens=vocabulary.keys() - merged)
    unknown = [
        token
        for token, token_type in zip(tokens, types, strict=False)
        if token_type == TokenType.UNKNOWN
    ]
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        # Also where a text begins with a space, and after special tokens, as llama.cpp does.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        steps.append(decoders.Strip(" ", left=1))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The file's chat template, or all of them by name where it has several."""
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates") or []
    named = {
        name: template
        for name in names
        if (template := metadata.get(f"tokenizer.chat_template.{name}")) is not None
    }
    return {"default": default} | named if named and default else default


def write_sentencepiece_model(metadata: Mapping[str, Any], path: Path) -> None:
    """Writes the vocabulary of a SentencePiece GGUF file as a `tokenizer.model`.

    llama.cpp's converter takes the scores from there; with `tokenizer.json` alone it would tokenise
    texts differently. Nothing is written where SentencePiece does not accept the vocabulary.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    model = sentencepiece_model_pb2.ModelProto()
    scores = metadata["tokenizer.ggml.scores"]
    for token, score, token_type in zip(tokens, scores, types, strict=False):
        # Type 0, undefined, and types of the future are none of SentencePiece's.
        kind = token_type if token_type in list(TokenType) else TokenType.NORMAL
        model.pieces.add(piece=token, score=score, type=int(kind))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = list(types).count(TokenType.BYTE) == 256
    for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(trainer, f"{name}_id", metadata.get(f"tokenizer.ggml.{key}_token_id", -1))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    content = model.SerializeToString()
    try:
        SentencePieceProcessor().LoadFromSerializedProto(content)
    except RuntimeError:
        return
    path.write_bytes(content)
