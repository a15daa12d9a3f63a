"""The tokenizer of an output folder, as every runtime that reads checkpoints expects it.

transformers 5 reads all it needs from `tokenizer.json` and writes little else. Version 4.57 refuses
the class name and the list of extra tokens that version 5 writes. llama.cpp's converter takes a
SentencePiece vocabulary with its scores from `tokenizer.model`, and tokens that were added later
from `tokenizer_config.json`. So the older fields are written too, and the files of the source are
kept where they agree with the tokenizer that was loaded.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import TransActError
from transact_core.base.files import read_text
from transact_core.models.checkpoint_folder import own_files

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILES = ("vocab.json", "merges.txt")
VERSIONED_FILES = ("tokenizer.model.v*", "tekken.json")
"""Mistral's own forms of the vocabulary, kept as they are."""

NOT_EXPORTED = ("backend", "is_local", "local_files_only")
"""Fields that say how the tokenizer was loaded here, which version 5 saves with the others."""


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, source: Path | None = None
) -> None:
    """Writes a tokenizer into `folder`, with the tokenizer files of `source` that agree with it.

    `source` is the folder that the tokenizer was loaded from. What transformers writes has
    precedence over what lies there.

    Raises:
        TransActError: `source` is not there any more.
    """
    if source is not None and not source.is_dir():
        raise TransActError(
            f"The folder {source}, from which the model was loaded, was removed meanwhile, and "
            "with it the files of its tokenizer; load the model again."
        )
    tokenizer.save_pretrained(folder)
    if not tokenizer.is_fast:
        return
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(_portable(stored, tokenizer), indent=2, sort_keys=True, ensure_ascii=False)
        + "\n",
        encoding="utf-8",
    )
    if source is not None:
        _keep_vocabulary_files(tokenizer, folder, source)


def _portable(stored: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Fields of a `tokenizer_config.json` that transformers 4.57 and 5 read alike."""
    fields = {name: value for name, value in stored.items() if name not in NOT_EXPORTED}
    # This class takes everything from tokenizer.json; the classes of single models, such as
    # LlamaTokenizer, rebuild parts of it, and differently in each version.
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := fields.pop("extra_special_tokens", None), list):
        fields["additional_special_tokens"] = extra
    fields["added_tokens_decoder"] = {
        str(token_id): token.__getstate__()
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    # Version 4 changes a pre-tokenizer that does not agree with this field.
    state = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    fields.pop("add_prefix_space", None)
    if "add_prefix_space" in state:
        fields["add_prefix_space"] = state["add_prefix_space"]
    # Version 4 has other defaults for these.
    fields["model_input_names"] = list(tokenizer.model_input_names)
    fields["padding_side"] = tokenizer.padding_side
    fields["truncation_side"] = tokenizer.truncation_side
    fields["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)
    return fields


def _keep_vocabulary_files(tokenizer: PreTrainedTokenizerBase, folder: Path, source: Path) -> None:
    kept: list[Path] = []
    model = source / SENTENCEPIECE_FILE
    if model.is_file() and _is_sentencepiece_of(model, tokenizer):
        kept.append(model)
    if _is_vocabulary_of(source / BPE_FILES[0], tokenizer):
        kept += [source / name for name in BPE_FILES]
    for pattern in VERSIONED_FILES:
        kept += source.glob(pattern)
    for file in own_files(source, kept):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    # These two are made anew from the tokenizer: copies may contradict tokenizer_config.json.
    if (source / "special_tokens_map.json").is_file():
        _write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)
    if (source / "added_tokens.json").is_file():
        added = {
            token.content: token_id
            for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
            if token_id >= tokenizer.vocab_size
        }
        _write_json(folder / "added_tokens.json", added)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_sentencepiece_of(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each ordinary piece of a SentencePiece model is the token of the same id.

    Control and unused pieces may have been renamed in `tokenizer_config.json`, which runtimes read
    too.
    """
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(path))
    except (RuntimeError, OSError):  # such as a vocabulary of tiktoken under the same name
        return False
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    return all(
        vocabulary.get(pieces.IdToPiece(piece_id)) == piece_id
        for piece_id in range(pieces.GetPieceSize())
        if piece_id not in added and not (pieces.IsControl(piece_id) or pieces.IsUnused(piece_id))
    )


def _is_vocabulary_of(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a `vocab.json` has the ids of the tokenizer's tokens."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        stored = json.loads(read_text(path))
        vocabulary = tokenizer.get_vocab()
        return bool(stored) and all(vocabulary.get(token) == i for token, i in stored.items())
    return False
