"""A source that the user names to one text with a SHA-256: built-in, file, hub dataset or mix."""

import codecs
import json
import os
import pydoc_data.topics
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path

import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import TransActError, first_line
from transact_core.base.files import expanded, sha256_of_text
from transact_core.data.conversations import (
    Conversation,
    Message,
    apply_chat_template,
    as_plain_text,
    conversation_from_columns,
    conversation_from_messages,
    find_conversation_columns,
    has_chat_template,
)
from transact_core.models.hub import access_refusal

BUILTIN_TEXT = "builtin"
GENERATED = "generated"
GENERATED_TOKENS = 16_384
"""Tokens of a text by the model itself where the source names no number."""
MOST_GENERATED_TOKENS = 10_000_000
"""More than these a model writes too slowly; a wrong number is told at once."""
GENERATED_KINDS = ("any", "plain", "chat")
MIXED = "+"
"""Between the sources of a mix."""
BUILTIN_CODE = "builtin-code"
BUILTIN_TEXTS = (BUILTIN_TEXT, BUILTIN_CODE)
"""Texts that come with every CPython: its language reference, and source code, which differs from
it in kind."""
CODE_MODULES = ("argparse", "difflib", "heapq", "inspect", "shutil", "subprocess", "textwrap")
"""Modules of the standard library, each a single file, together about as long as the reference."""
MAX_CHARACTERS = 16_000_000
"""Longer texts are read this far: some millions of tokens, more than any measurement here takes."""
MAX_GROUP_BYTES = 500_000_000
"""Bytes that one column may unpack to in one row group of a Parquet file."""
BATCH_ROWS = 64
"""Few, since a packed column may repeat one long text in every row."""
HUB_TIMEOUT_S = 10
"""Seconds that the hub may take to say whether it has a dataset."""
TEXT_COLUMNS = ("text", "content", "document")
"""Columns of text, in the order in which they are looked for."""
BYTE_ORDER_MARK = "\ufeff"
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""The byte-order marks of encodings other than UTF-8; UTF-32's first, which begin like UTF-16's."""
LONGEST_MARK_BYTES = 4


@dataclass(frozen=True)
class GeneratedText:
    """A text that a model is to write: `generated[:TOKENS[:SEED[:KIND]]]`."""

    tokens: int = GENERATED_TOKENS
    """How many it has at least."""
    seed: int = 0
    kind: str = "any"
    """`plain` from random first tokens, `chat` answers to prompts; `any` of a model with a chat
    template both in turn, of others `plain`."""

    @property
    def source(self) -> str:
        kind = "" if self.kind == "any" else f":{self.kind}"
        return f"{GENERATED}:{self.tokens}:{self.seed}{kind}"


@dataclass(frozen=True)
class Corpus:
    """One text, where it came from and its fingerprint."""

    source: str
    text: str = field(repr=False)
    sha256: str
    """Of the text as it is used: line ends and byte-order marks are not those of the file."""
    notices: tuple[str, ...] = ()
    conversations: tuple[Conversation, ...] = field(default=(), repr=False)
    """Where the rows are conversations, these, until `for_model` has written them as the model's
    chat template does; `text` holds them as plain text meanwhile."""
    has_special_tokens: bool = False
    """Whether the text names its special tokens itself, as a chat template writes it."""
    parts: tuple["Corpus", ...] = field(default=(), repr=False)
    """Of a mix its texts; windows are dealt from them in turn, and `text` is empty."""
    to_write: GeneratedText | None = None
    """What a model has yet to write, by `forward.writing`; until then `text` is empty, and the
    SHA-256 is that of the source's name."""


Piece = str | Conversation | None
"""What a row of a table holds; None where it is missing."""


def read_corpus(source: str) -> Corpus:
    """Reads a built-in text, a `.txt`, `.md`, `.jsonl` or `.parquet` file, a hub dataset, or a mix.

    The built-in texts are `builtin` and `builtin-code`. A hub dataset is named
    `hub:DATASET[:CONFIG[:SPLIT[:COLUMN]]]`, its split `train` by default; a column of a `.jsonl` or
    `.parquet` file as `FILE:COLUMN`. Rows of text are joined by blank lines. Rows may also be
    conversations: a list of turns (`messages`, `conversations`), or a question and its answer
    (`instruction` and `output`, `prompt` and `completion` or `response`).
    `generated[:TOKENS[:SEED]]` is a text that a model has yet to write, and `A+B` a mix of sources.
    At most `MAX_CHARACTERS` of each are read. Texts are UTF-8, or what their byte-order mark says;
    line ends are read as newlines.

    Raises:
        TransActError: the source is missing, empty, binary or holds no text.
    """
    sources = mixed_sources(source)
    if len(sources) > 1:
        return mix([read_corpus(part) for part in sources])
    return next(read_corpora(source))


def read_corpora(source: str) -> Iterator[Corpus]:
    """The text of one source in pieces, each a corpus; the first is that of `read_corpus`.

    Training takes more than `MAX_CHARACTERS`, and each piece is read only when it is asked for.

    Raises:
        TransActError: as `read_corpus` does, at any piece.
    """
    try:
        yield from _read_corpora(source.strip())
    except OSError as error:
        path, _ = file_and_column(source.strip())
        raise TransActError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_corpora(source: str) -> Iterator[Corpus]:
    if source == BUILTIN_TEXT:
        yield corpus_from_text(source, _builtin_text())
        return
    if source == BUILTIN_CODE:
        yield corpus_from_text(source, _builtin_code())
        return
    if is_generated(source):
        wanted = _generated(source)
        yield Corpus(wanted.source, "", sha256_of_text(wanted.source), to_write=wanted)
        return
    if source.startswith("hub:"):
        yield from _gather_all(source, _hub_rows(source))
        return
    path, column = file_and_column(source)
    if not os.path.isfile(path):
        raise TransActError(
            f"There is no text at {str(path)!r}: name a .txt, .jsonl or .parquet file, a column "
            f"of one as FILE:COLUMN, hub:DATASET, {BUILTIN_TEXT!r}, {BUILTIN_CODE!r}, "
            f"{GENERATED!r}, or several with {MIXED} between them."
        )
    yield from _file_corpora(source, path, column)


def is_generated(source: str) -> bool:
    """Whether a source is a text that a model writes; no file is read under such a name."""
    return source == GENERATED or source.startswith(f"{GENERATED}:")


def mixed_sources(source: str) -> tuple[str, ...]:
    """The sources of a mix, `A+B+C`; one where it is none.

    A file's name may hold a plus sign itself: what exists as a whole is a file.
    """
    pieces = source.strip().split(MIXED)
    found = []
    while pieces:
        for taken in range(len(pieces), 0, -1):
            joined = MIXED.join(pieces[:taken])
            if taken == 1 or os.path.isfile(file_and_column(joined)[0]):
                break
        found.append(joined.strip())
        pieces = pieces[taken:]
    return tuple(found)


def mix(parts: Sequence[Corpus]) -> Corpus:
    """A corpus of several, from which windows are dealt in turn.

    Its SHA-256 is that of the parts' SHA-256s, a line each.

    Raises:
        TransActError: two of them are the same text.
    """
    digests = [part.sha256 for part in parts]
    if len(set(digests)) < len(digests):
        raise TransActError(
            f"Each text of a mix is named once; two of {MIXED.join(part.source for part in parts)} "
            "are the same text."
        )
    return Corpus(
        source=MIXED.join(part.source for part in parts),
        text="",
        sha256=sha256_of_text("".join(f"{digest}\n" for digest in digests)),
        notices=tuple(dict.fromkeys(notice for part in parts for notice in part.notices)),
        parts=tuple(parts),
    )


def texts_of(corpus: Corpus) -> tuple[Corpus, ...]:
    """The single texts of a corpus: those of a mix, or itself."""
    return corpus.parts or (corpus,)


def require_written(corpus: Corpus) -> None:
    """Refuses a text that a model has yet to write.

    Raises:
        TransActError: it is one, or a mix with one.
    """
    if any(part.to_write for part in texts_of(corpus)):
        raise TransActError(
            f"The text {corpus.source} is to be written by a model, and none is at hand here; "
            "name a file."
        )


def _generated(source: str) -> GeneratedText:
    """The generated text that a source names.

    Raises:
        TransActError: it is not of the form `generated[:TOKENS[:SEED[:KIND]]]`.
    """
    found = re.fullmatch(
        rf"{GENERATED}(?::([0-9]{{1,18}}))?(?::([0-9]{{1,18}}))?(?::(plain|chat))?", source
    )
    if found is None:
        raise TransActError(
            f"{source!r} is not of the form {GENERATED}[:TOKENS[:SEED]], two numbers."
        )
    tokens, seed, kind = found.groups()
    wanted = GeneratedText(int(tokens or GENERATED_TOKENS), int(seed or 0), kind or "any")
    if not 2 <= wanted.tokens <= MOST_GENERATED_TOKENS:
        raise TransActError(
            f"{source!r} asks for {wanted.tokens:,} tokens; a model writes 2 to "
            f"{MOST_GENERATED_TOKENS:,}."
        )
    return wanted


def corpus_from_text(source: str, text: str) -> Corpus:
    """A corpus from a string already in memory.

    Line ends are made newlines, which a notice says, and byte-order marks are left out.

    Raises:
        TransActError: the text is empty or holds half of a surrogate pair.
    """
    notices = []
    # Longer than what is used, as line ends of two characters become one.
    text = text[: 2 * MAX_CHARACTERS]
    if "\r" in text:
        notices.append(_line_end_notice(source))
    text = with_newlines(text)
    if len(text) >= MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS]
        notices.append(shortened_notice(source))
    if not text.replace(BYTE_ORDER_MARK, "").strip():
        raise TransActError(f"The text {source} is empty.")
    try:
        sha256 = sha256_of_text(text)
    except UnicodeEncodeError:
        raise TransActError(
            f"The text {source} holds half of a surrogate pair, which is no character; "
            "write it anew as UTF-8."
        ) from None
    return Corpus(source=source, text=text, sha256=sha256, notices=tuple(notices))


def shortened_notice(source: str) -> str:
    """The notice of a text that goes on behind its first `MAX_CHARACTERS`."""
    return f"Only the first {MAX_CHARACTERS:,} characters of {source} are used."


def for_model(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The corpus as text for one model: its conversations as the model's chat template has them.

    Where the model has no chat template, they stay plain text, each turn as `role: content`, and a
    notice says so. A corpus without conversations is given back as it is.

    Raises:
        TransActError: the chat template is faulty or refuses a conversation.
    """
    require_written(corpus)
    if corpus.parts:
        return mix([for_model(part, tokenizer) for part in corpus.parts])
    if not corpus.conversations:
        return corpus
    if not has_chat_template(tokenizer):
        notice = (
            f"The model has no chat template: the conversations of {corpus.source} are read as "
            "plain text, every turn as 'role: content'."
        )
        return replace(corpus, conversations=(), notices=(*corpus.notices, notice))
    text = apply_chat_template(corpus.conversations, tokenizer, corpus.source, MAX_CHARACTERS)
    written = corpus_from_text(corpus.source, text)
    notices = tuple(dict.fromkeys(corpus.notices + written.notices))
    return replace(written, notices=notices, has_special_tokens=True)


def file_and_column(source: str) -> tuple[Path, str | None]:
    """The file that a source names, and its column where it names one as `FILE:COLUMN`.

    Paths may hold colons themselves (as `C:\\texts` does): what exists as a whole is a path.
    """
    path = expanded(source)
    if os.path.lexists(path):
        return path, None
    head = source
    while ":" in head:
        head = head.rpartition(":")[0]
        column = source[len(head) + 1 :]
        file = expanded(head)
        # No column is a way out of a folder that a server allows to be read.
        if column and not set(column) & set("/\\") and os.path.isfile(file):
            return file, column
    return path, None


def with_newlines(text: str) -> str:
    """The text with `\\n` for every line end and without byte-order marks at line starts.

    Files that were appended to each other have such marks inside.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if BYTE_ORDER_MARK in text:
        text = text.removeprefix(BYTE_ORDER_MARK).replace(f"\n{BYTE_ORDER_MARK}", "\n")
    return text


def describe(source: str) -> str:
    """A source in words fit for a report."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if source == BUILTIN_TEXT:
        return f"Python {version}'s own reference (pydoc_data.topics)"
    if source == BUILTIN_CODE:
        return f"source code of Python {version}'s standard library"
    if is_generated(source):
        return f"text written by the model itself ({source})"
    parts = mixed_sources(source)
    return f"a mix of {' and '.join(map(describe, parts))}" if len(parts) > 1 else source


def short_name(source: str) -> str:
    """A source in a few words, for labels: a built-in text, or the name of file or dataset."""
    source = source.strip()
    parts = mixed_sources(source)
    if len(parts) > 1:
        return " + ".join(map(short_name, parts))
    if is_generated(source):
        return "answers by the model" if source.endswith(":chat") else "text by the model"
    if source == BUILTIN_TEXT:
        return "Python's reference"
    if source == BUILTIN_CODE:
        return "Python's source code"
    if source.startswith("hub:"):
        return source.split(":")[1]
    path, column = file_and_column(source)
    return path.name if column is None else f"{path.name}:{column}"


def of_one_kind(source: str, other: str) -> bool:
    """Whether two sources are known to hold text of one kind: one text, one file or one dataset.

    Of others nothing is known: two files may well be of one kind. A mix is of the kinds of its
    parts.
    """

    def collection(source: str) -> str:
        if source.startswith("hub:"):
            return ":".join(source.split(":")[:2])
        if is_generated(source):
            return GENERATED
        return source if source in BUILTIN_TEXTS else str(file_and_column(source)[0])

    ours, theirs = ({collection(part) for part in mixed_sources(each)} for each in (source, other))
    return not ours.isdisjoint(theirs)


def _builtin_text() -> str:
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _builtin_code() -> str:
    """The modules of `CODE_MODULES`, one after the other.

    Raises:
        TransActError: this Python comes without its source code.
    """
    texts = []
    for name in CODE_MODULES:
        found = find_spec(name)
        try:
            texts.append(found.loader.get_source(name))
        except (AttributeError, ImportError, OSError):
            texts.append(None)
    if None in texts:
        raise TransActError(
            f"This Python comes without the source code of its standard library, so there is no "
            f"text {BUILTIN_CODE!r}; name a file."
        )
    return "\n\n".join(texts)


def _file_corpora(source: str, path: Path, column: str | None) -> Iterator[Corpus]:
    kind = path.suffix.lower()
    if kind in PLAIN_KINDS:
        if column is not None:
            raise TransActError(f"{path} has no columns to name; .jsonl and .parquet files have.")
        yield corpus_from_text(source, _plain_text(path))
        yield from _further_text(source, path)
        return
    if kind not in TABLE_READERS:
        raise TransActError(
            f"{path} is none of .txt, .jsonl and .parquet; save the text as one of these."
        )
    yield from _gather_all(source, TABLE_READERS[kind](path, column))


def _encoding(beginning: bytes) -> str:
    """What the byte-order mark at the beginning of a file says; UTF-8 where there is none."""
    return next((name for mark, name in ENCODINGS if beginning.startswith(mark)), "UTF-8")


def _plain_text(path: Path) -> str:
    """The text of a file, at least as far as it is used."""
    limit = 8 * MAX_CHARACTERS
    with path.open("rb") as file:
        raw = file.read(limit)
    encoding = _encoding(raw[:LONGEST_MARK_BYTES])
    if encoding == "UTF-8" and b"\0" in raw:
        raise TransActError(
            f"{path} is a binary file, or UTF-16 without a byte-order mark; save the text as UTF-8."
        )
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        # A character may be cut in two where the reading stopped.
        return decoder.decode(raw, final=len(raw) < limit)
    except UnicodeDecodeError as error:
        raise TransActError(
            f"{path} is not {encoding} text (byte {error.start}); convert it to UTF-8."
        ) from None


def _further_text(source: str, path: Path) -> Iterator[Corpus]:
    """The text of a plain file behind its first `MAX_CHARACTERS`, in pieces as long as these."""
    with path.open("rb") as file:
        encoding = _encoding(file.read(LONGEST_MARK_BYTES))
    with path.open(encoding=encoding) as file:  # line ends become newlines, as in the beginning
        file.read(MAX_CHARACTERS)
        while True:
            try:
                text = file.read(MAX_CHARACTERS)
            except UnicodeDecodeError:
                raise TransActError(
                    f"{path} is not {encoding} text; convert it to UTF-8."
                ) from None
            if not text:
                return
            if text.strip():
                yield corpus_from_text(source, text)


def _json_lines(path: Path, column: str | None) -> Iterator[Piece]:
    longest = 4 * MAX_CHARACTERS
    with path.open("rb") as file:
        encoding = _encoding(file.read(LONGEST_MARK_BYTES))
    with path.open(encoding=encoding, newline="") as file:
        for line_number in count(1):
            where = f"Line {line_number} of {path}"
            try:
                line = file.readline(longest)
            except UnicodeDecodeError:
                raise TransActError(
                    f"{where}, or one soon after it, is not {encoding} text; convert it to UTF-8."
                ) from None
            if not line:
                return
            if len(line) == longest:
                raise TransActError(f"{where} is too long to be read.")
            line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise TransActError(f"{where} is not JSON.") from None
            if isinstance(row, dict):
                yield _piece(row, _columns(row, column, str(path)), where)
            elif isinstance(row, str) and column is None:
                yield row
            else:
                wanted = "is neither text nor an object" if column is None else "has no columns"
                raise TransActError(f"{where} {wanted}.")


def _parquet_rows(path: Path, column: str | None) -> Iterator[Piece]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = _columns(file.schema_arrow.names, column, str(path))
        _require_modest_rows(file.metadata, columns, path)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            for row in batch.to_pylist():
                yield _piece(row, columns, str(path))
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError):
        raise TransActError(f"{path} is truncated, corrupt or not a Parquet file.") from None


PLAIN_KINDS = (".txt", ".md")
TABLE_READERS: dict[str, Callable[[Path, str | None], Iterator[Piece]]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}


def _require_modest_rows(
    metadata: pyarrow.parquet.FileMetaData, columns: tuple[str, ...], path: Path
) -> None:
    """Refuses row groups that would fill the memory once they are unpacked."""
    for group_index in range(metadata.num_row_groups):
        row_group = metadata.row_group(group_index)
        for chunk_index in range(metadata.num_columns):
            chunk = row_group.column(chunk_index)
            # Of a column of turns, `messages.list.element.content` is a chunk.
            read = chunk.path_in_schema in columns or any(
                chunk.path_in_schema.startswith(f"{column}.") for column in columns
            )
            if read and chunk.total_uncompressed_size > MAX_GROUP_BYTES:
                raise TransActError(
                    f"The column {chunk.path_in_schema!r} of {path} unpacks to "
                    f"{chunk.total_uncompressed_size / 1e6:,.0f} MB in one row group; write the "
                    "file in smaller row groups."
                )


def _hub_rows(source: str) -> Iterator[Piece]:
    parts = [*source.removeprefix("hub:").split(":"), "", "", ""]
    name, config, split, column = parts[:4]
    if not name or len(parts) > 7:
        raise TransActError(f"{source!r} is not of the form hub:DATASET[:CONFIG[:SPLIT[:COLUMN]]].")
    # Importing datasets takes over a second and most runs never need it.
    from datasets import load_dataset

    where = f"The dataset {name}"
    try:
        # datasets would try an unreachable hub for half a minute, with a line for each attempt.
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield _piece(row, _columns(row, column or None, where), where)
    except TransActError:
        raise
    except Exception as error:
        message = access_refusal(name, error, "dataset") or (
            f"The dataset {name} could not be read from the hub ({first_line(error)}); "
            "check its name, config and split and the network, or name a text file."
        )
        raise TransActError(message) from None


def _columns(names: Iterable[str], column: str | None, where: str) -> tuple[str, ...]:
    """The columns to be read: the one asked for, one of text, or those of a conversation."""
    names = list(names)
    if column is not None:
        if column not in names:
            raise TransActError(f"{where} has no column {column!r}; it has {', '.join(names)}.")
        return (column,)
    for name in TEXT_COLUMNS:
        if name in names:
            return (name,)
    columns = find_conversation_columns(names)
    if not columns:
        raise TransActError(
            f"{where} has no column named {', '.join(TEXT_COLUMNS)} or messages, nor a question "
            f"and an answer; it has {', '.join(names)}. Name one by adding :COLUMN to the source."
        )
    return columns


def _piece(row: Mapping[str, object], columns: tuple[str, ...], where: str) -> Piece:
    """What a row holds in these columns.

    Raises:
        TransActError: it is neither text nor turns; it is refused instead of being spelt out.
    """
    values = [row[column] for column in columns]
    where = f"{where}, column {columns[0]!r},"
    if len(values) > 1:
        return conversation_from_columns(values, where)
    (value,) = values
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return conversation_from_messages(value, where)
    raise TransActError(f"{where} holds {type(value).__name__} where text is expected.")


def _gather_all(source: str, rows: Iterable[Piece]) -> Iterator[Corpus]:
    """Corpora of the rows of a table, one after the other."""
    left = iter(rows)
    yield _gather(source, left)
    for row in left:
        piece = _gather(source, chain([row], left), may_be_empty=True)
        if piece is not None:
            yield piece


def _gather(source: str, rows: Iterable[Piece], may_be_empty: bool = False) -> Corpus | None:
    """A corpus of the rows of a table, those that are missing passed over.

    No more rows are taken than are used; None where they hold no text and `may_be_empty`.

    Raises:
        TransActError: some rows are text and others conversations.
    """
    texts: list[str] = []
    conversations: list[Conversation] = []
    notices: tuple[str, ...] = ()
    length = 0
    for row in rows:
        if isinstance(row, str):
            texts.append(row)
        elif row:
            if any("\r" in turn.content for turn in row):
                notices = (_line_end_notice(source),)
            # A template puts words before a turn, so its beginning is no line start later.
            conversation = tuple(Message(turn.role, with_newlines(turn.content)) for turn in row)
            conversations.append(conversation)
            texts.append(as_plain_text(conversation))
        else:
            continue
        length += len(texts[-1]) + 2
        if length > MAX_CHARACTERS:
            break
    if conversations and len(conversations) < len(texts):
        raise TransActError(
            f"The text {source} mixes rows of text and conversations; name one of its columns by "
            "adding :COLUMN to the source."
        )
    if may_be_empty and not any(text.strip() for text in texts):
        return None
    corpus = corpus_from_text(source, "\n\n".join(texts))
    return replace(corpus, conversations=tuple(conversations), notices=(*notices, *corpus.notices))


def _line_end_notice(source: str) -> str:
    return (
        f"The line ends of {source} hold carriage returns, as Windows writes them; they are read "
        "as newlines."
    )
