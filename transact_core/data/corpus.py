"""A source that the user names to one text with a SHA-256: built-in, file or hub dataset."""

import json
import pydoc_data.topics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi

from transact_core.base.errors import TransActError, first_line
from transact_core.base.files import sha256_of_text

BUILTIN_TEXT = "builtin"
MAX_CHARACTERS = 16_000_000
"""Longer texts are read this far: some millions of tokens, more than any measurement here takes."""
MAX_GROUP_BYTES = 500_000_000
BATCH_ROWS = 64
"""Few, since a packed column may repeat one long text in every row."""
HUB_TIMEOUT_S = 10
TEXT_COLUMNS = ("text", "content", "document")


@dataclass(frozen=True)
class Corpus:
    """One text, where it came from and its fingerprint."""

    source: str
    text: str = field(repr=False)
    sha256: str
    notices: tuple[str, ...] = ()


def read_corpus(source: str) -> Corpus:
    """Reads `builtin`, a `.txt`, `.jsonl` or `.parquet` file, or a hub dataset.

    A hub dataset is named `hub:DATASET[:CONFIG[:SPLIT[:COLUMN]]]`, its split `train` by default.
    Rows of a table are joined by blank lines. At most `MAX_CHARACTERS` are read.

    Raises:
        TransActError: the source is missing, empty, binary or holds no text.
    """
    source = source.strip()
    if source == BUILTIN_TEXT:
        text = _builtin_text()
    elif source.startswith("hub:"):
        text = _hub_text(source)
    else:
        text = _file_text(Path(source).expanduser())
    return corpus_from_text(source, text)


def corpus_from_text(source: str, text: str) -> Corpus:
    """A corpus from a string already in memory, such as an uploaded file's."""
    notices: tuple[str, ...] = ()
    if len(text) >= MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS]
        notices = (f"Only the first {MAX_CHARACTERS:,} characters of {source} are used.",)
    if not text.replace("\ufeff", "").strip():
        raise TransActError(f"The text {source} is empty.")
    try:
        sha256 = sha256_of_text(text)
    except UnicodeEncodeError:
        raise TransActError(
            f"The text {source} holds half of a surrogate pair, which is no character; "
            "write it anew as UTF-8."
        ) from None
    return Corpus(source=source, text=text, sha256=sha256, notices=notices)


def describe(source: str) -> str:
    """A source in words fit for a report."""
    if source == BUILTIN_TEXT:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python {version}'s own reference (pydoc_data.topics)"
    return source


def _builtin_text() -> str:
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _file_text(path: Path) -> str:
    readers = {".txt": _plain_text, ".md": _plain_text, ".jsonl": _json_lines, ".parquet": _parquet}
    if not path.is_file():
        raise TransActError(
            f"There is no text at {str(path)!r}: name a .txt, .jsonl or .parquet file, "
            f"hub:DATASET or {BUILTIN_TEXT!r}."
        )
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TransActError(
            f"{path} is none of .txt, .jsonl and .parquet; save the text as one of these."
        )
    return reader(path)


def _plain_text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(4 * MAX_CHARACTERS)
    if b"\0" in raw:
        raise TransActError(f"{path} is a binary file, not text.")
    try:
        return raw.decode("utf-8")[:MAX_CHARACTERS]
    except UnicodeDecodeError as error:
        if len(raw) == 4 * MAX_CHARACTERS and error.start > len(raw) - 4:
            return raw[: error.start].decode("utf-8")[:MAX_CHARACTERS]
        raise TransActError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from None


def _json_lines(path: Path) -> str:
    def rows() -> Iterator[str | None]:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(4 * MAX_CHARACTERS)
                if not line:
                    return
                if len(line) == 4 * MAX_CHARACTERS:
                    raise TransActError(f"Line {number} of {path} is too long to be read.")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except (ValueError, RecursionError):
                    raise TransActError(f"Line {number} of {path} is not JSON.") from None
                if isinstance(row, str):
                    yield row
                elif isinstance(row, dict):
                    yield _as_text(row[_text_column(row, str(path))], f"Line {number} of {path}")
                else:
                    raise TransActError(f"Line {number} of {path} is neither text nor an object.")

    return _join(rows())


def _parquet(path: Path) -> str:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = _text_column(file.schema_arrow.names, str(path))
        _require_modest_rows(file.metadata, column, path)
        rows = (
            _as_text(value, f"The column {column!r} of {path}")
            for batch in file.iter_batches(BATCH_ROWS, columns=[column])
            for value in batch.column(0).to_pylist()
        )
        return _join(rows)
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError):
        raise TransActError(f"{path} is truncated, corrupt or not a Parquet file.") from None


def _require_modest_rows(metadata: pyarrow.parquet.FileMetaData, column: str, path: Path) -> None:
    """Refuses row groups that would fill the memory once they are unpacked."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(metadata.num_columns):
            chunk = row_group.column(number)
            if chunk.path_in_schema != column or chunk.total_uncompressed_size <= MAX_GROUP_BYTES:
                continue
            raise TransActError(
                f"The column {column!r} of {path} unpacks to "
                f"{chunk.total_uncompressed_size / 1e6:,.0f} MB in one row group; write the file "
                "in smaller row groups."
            )


def _hub_text(source: str) -> str:
    parts = [*source.removeprefix("hub:").split(":"), "", "", ""]
    name, config, split, column = parts[:4]
    if not name or len(parts) > 7:
        raise TransActError(f"{source!r} is not of the form hub:DATASET[:CONFIG[:SPLIT[:COLUMN]]].")
    # Importing datasets takes over a second and most runs never need it.
    from datasets import load_dataset

    try:
        # datasets would try an unreachable hub for half a minute, with a line for each attempt.
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        return _join(
            _as_text(row[column or _text_column(row, name)], f"The dataset {name}") for row in rows
        )
    except TransActError:
        raise
    except KeyError:
        raise TransActError(f"The dataset {name} has no column {column!r}.") from None
    except Exception as error:
        raise TransActError(
            f"The dataset {name} could not be read from the hub ({first_line(error)}); "
            "check its name, config and split and the network, or name a text file."
        ) from None


def _as_text(value: object, where: str) -> str | None:
    """What is no text is refused instead of being spelt out; a missing one stays missing."""
    if value is not None and not isinstance(value, str):
        raise TransActError(f"{where} holds {type(value).__name__} where text is expected.")
    return value


def _text_column(names: Iterable[str], where: str) -> str:
    names = list(names)
    for name in TEXT_COLUMNS:
        if name in names:
            return name
    raise TransActError(
        f"{where} has no column named {', '.join(TEXT_COLUMNS)}; it has {', '.join(names)}."
    )


def _join(rows: Iterable[str | None]) -> str:
    pieces, length = [], 0
    for row in rows:
        if row is None:
            continue
        pieces.append(row)
        length += len(row) + 2
        if length > MAX_CHARACTERS:
            break
    return "\n\n".join(pieces)
