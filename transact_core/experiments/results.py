"""Measured points kept on disk between runs, so that no cut is measured twice.

One SQLite file in the cache folder holds them. The key of a point is the SHA-256 of everything
that determined it: the bench, the cut, and what `base.cache.digest` adds. A point belongs to the
cut, not to the ratios that asked for it; what `auto` and several steps decided for given ratios is
kept beside the points.

Keeping points is a convenience that never stops a measurement. Every access is one short
transaction on its own connection, each record carries a SHA-256 of its own, and where the file
cannot be read or written, the point is measured and not kept. A damaged file is set aside. With
write-ahead logging (WAL) several processes read while one writes, and killing a process loses at
most the record that it was writing. Records that nobody read for 90 days are removed, and the
least recently read ones where the file holds more than its share of the cache.
"""

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from transact_core.base.cache import UNUSED_SECONDS, digest, sha256_of_tokens
from transact_core.base.errors import Progress, silent
from transact_core.base.files import cache_folder, cache_limit_bytes
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench, Choices, Measurement, compress
from transact_core.experiments.decide import decide
from transact_core.forward.continuations import Answer
from transact_core.forward.perplexity import Evaluation
from transact_core.models.footprint import Footprint
from transact_core.pruning.closed_form import LayerFit
from transact_core.pruning.plan import Decision, PruningPlan

SCHEMA_VERSION = 4
"""Of the SQLite file. Schema 1 had no time of last use, and its keys held the package's version:
none of its records can be found any more, so they are dropped. Schema 2 had no answers, schema 3 no
GGUF files."""
BUSY_SECONDS = 10
"""How long a transaction waits for another one to end."""
SHARE_OF_CACHE = 0.1
"""The most that the records may take of the cache folder's limit. A point of 40,960 tokens takes
about 170 kB, so the default limit of 20 GB holds about 12,000 of these."""
MARK_SECONDS = 24 * 3600
"""The last use of a record is kept to the day, so that reading rarely writes."""
EVICTED_AT_ONCE = 8
"""Records of each table removed at a time while the file holds too much."""
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DECISION = TypeAdapter(Decision)
_POINTS, _DECISIONS, _ANSWERS, _FILES = "points", "decisions", "answers", "files"
_TABLES = (_POINTS, _DECISIONS, _ANSWERS, _FILES)
_CREATE = """
CREATE TABLE IF NOT EXISTS {table} (
    key TEXT PRIMARY KEY, used INTEGER NOT NULL, record TEXT, nll BLOB, sha256 TEXT
) WITHOUT ROWID
"""

notices: list[str] = []
"""One sentence for each file of results that could not be used, for the page and the log."""

Compress = Callable[[Bench, PruningPlan, str, Progress], tuple[PreTrainedModel, Measurement]]


def measured(
    bench: Bench,
    decision: Decision,
    recovery: str,
    progress: Progress = silent,
    compress: Compress = compress,
) -> Measurement:
    """The measurement of a cut: kept from an earlier run, or else made now and kept.

    Raises:
        TransActError: as `compress` does, which is called only where no kept point is found.
    """
    known = find(bench, decision, recovery)
    if known is None:
        known = compress(bench, decision.plan, recovery, progress)[1]
        known = replace(known, decision=decision)
        keep(bench, known)
    return known


def decided(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    progress: Progress = silent,
) -> Decision:
    """The decision of `decide`, kept where making it takes more than one set of scores.

    Raises:
        TransActError: as `decide` does.
    """
    known = find_decision(bench, mha_ratio, mlp_ratio, choices, progress)
    if known is None:
        known = decide(bench, mha_ratio, mlp_ratio, choices, progress)
        keep_decision(bench, mha_ratio, mlp_ratio, choices, known)
    return known


def keep_decision(
    bench: Bench, mha_ratio: float, mlp_ratio: float, choices: Choices, decision: Decision
) -> None:
    """Keeps what was decided for these ratios; does nothing where the file cannot be written."""
    key = _decision_key(bench, mha_ratio, mlp_ratio, choices)
    _write(_DECISIONS, key, _DECISION.dump_python(decision))


def find_decision(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    progress: Progress = silent,
) -> Decision | None:
    """The decision for these ratios if it is kept or takes no trial cuts, or else None."""
    if choices.single_pass:
        return decide(bench, mha_ratio, mlp_ratio, choices, progress)
    return _read(
        _DECISIONS,
        _decision_key(bench, mha_ratio, mlp_ratio, choices),
        lambda record, _: _DECISION.validate_python(record),
    )


def find(bench: Bench, decision: Decision, recovery: str) -> Measurement | None:
    """The kept measurement of this cut, or None; on all texts of the bench, or else none.

    It holds the decision given here, which says how the cut was asked for now. Its `seconds` are
    those that the measurement took when it was made.
    """

    def restored(record: dict[str, Any], nll: bytes) -> Measurement:
        shape = record.pop("nll_shape")
        values = torch.from_numpy(np.frombuffer(nll, np.float32).reshape(shape).copy())
        return Measurement(
            decision=decision,
            footprint=Footprint(**record.pop("footprint")),
            evaluation=Evaluation(nll=values),
            fits=tuple(LayerFit(**fit) for fit in record.pop("fits")),
            **record,
        )

    on_texts = []
    for windows in (None, *bench.others):
        found = _read(_POINTS, _point_key(bench, decision.plan, recovery, windows), restored)
        if found is None:
            return None
        on_texts.append(found)
    return replace(on_texts[0], others=tuple(point.evaluation for point in on_texts[1:]))


def keep(bench: Bench, point: Measurement) -> None:
    """Keeps a point, on each text as if that were the bench's first.

    Does nothing where the file cannot be written.
    """
    _keep_on(bench, point)
    for place, windows in enumerate(bench.others, start=1):
        _keep_on(bench, point.on_text(bench, place), windows)


def _keep_on(bench: Bench, point: Measurement, windows: Windows | None = None) -> None:
    nll = point.evaluation.nll
    record = {
        "recovery": point.recovery,
        "footprint": asdict(point.footprint),
        "nll_shape": list(nll.shape),
        "delta_nll": point.delta_nll,
        "delta_nll_se": point.delta_nll_se,
        "fits": [asdict(fit) for fit in point.fits],
        "seconds": point.seconds,
    }
    key = _point_key(bench, point.plan, point.recovery, windows)
    _write(_POINTS, key, record, nll.numpy().astype(np.float32).tobytes())


def find_answers(key: str) -> list[list[Answer]] | None:
    """The kept answers to a block of a task's questions, or None; see `experiments.tasks`."""

    def restored(record: dict[str, Any], _: bytes) -> list[list[Answer]]:
        return [
            [Answer(float(likelihood), bool(greedy)) for likelihood, greedy in question]
            for question in record["answers"]
        ]

    return _read(_ANSWERS, key, restored)


def keep_answers(key: str, answers: list[list[Answer]]) -> None:
    """Keeps the answers to a block; does nothing where the file cannot be written."""
    record = [
        [(answer.log_likelihood, answer.is_greedy) for answer in question] for question in answers
    ]
    _write(_ANSWERS, key, {"answers": record})


def find_file(key: str) -> tuple[dict[str, Any], torch.Tensor] | None:
    """The kept record of a GGUF file and its losses, or None; see `export.gguf_points`."""
    return _read(_FILES, key, _with_losses)


def keep_file(key: str, record: dict[str, Any], nll: torch.Tensor) -> None:
    """Keeps the record of a GGUF file; does nothing where the file cannot be written.

    The field `group` of the record is what `files_of` finds it by.
    """
    record = record | {"nll_shape": list(nll.shape)}
    _write(_FILES, key, record, nll.numpy().astype(np.float32).tobytes())


def files_of(group: str) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """The kept records of all GGUF files of a group, damaged ones left out."""
    query = f"SELECT key FROM {_FILES} WHERE json_extract(record, '$.group') = ?"
    keys = _transaction(lambda database: database.execute(query, (group,)).fetchall()) or ()
    return [found for (key,) in keys if (found := find_file(key)) is not None]


def _with_losses(record: dict[str, Any], nll: bytes) -> tuple[dict[str, Any], torch.Tensor]:
    shape = record.pop("nll_shape")
    return record, torch.from_numpy(np.frombuffer(nll, np.float32).reshape(shape).copy())


# --- keys ------------------------------------------------------------------------------------


def cut_identity(bench: Bench, plan: PruningPlan, recovery: str) -> dict[str, object]:
    """All that determines the weights of a cut; JSON."""
    made_on = {key: value for key, value in bench.identity.items() if key != "evaluation"}
    return {"bench": made_on, "cut": _cut(plan, recovery)}


def _cut(plan: PruningPlan, recovery: str) -> dict[str, object]:
    return {
        "layers": [layer.model_dump(mode="json") for layer in plan.layers],
        "slots": plan.slots,
        "importance": plan.importance,
        "recovery": recovery,
    }


def _point_key(
    bench: Bench, plan: PruningPlan, recovery: str, windows: Windows | None = None
) -> str:
    """Of a point on the bench's evaluation text, or on another as if that were the bench's."""
    made_on = bench.identity
    if windows is not None:
        made_on = {**made_on, "evaluation": sha256_of_tokens(windows.ids)}
    return digest({"bench": made_on, "cut": _cut(plan, recovery)})


def _decision_key(bench: Bench, mha_ratio: float, mlp_ratio: float, choices: Choices) -> str:
    asked = {"mha_ratio": mha_ratio, "mlp_ratio": mlp_ratio, **asdict(choices)}
    if choices.widths == "uniform":
        # As decisions were kept before there were others.
        del asked["widths"], asked["keep_layers"]
    if not choices.by_hand:
        del asked["by_hand"]
    return digest({"bench": bench.identity, "asked": asked})


# --- the file --------------------------------------------------------------------------------


def _read(table: str, key: str, restore: Callable[[dict[str, Any], bytes], Any]) -> Any:
    """The result of `restore` for a kept record, or None where there is none that is undamaged."""
    query = f"SELECT used, record, nll, sha256 FROM {table} WHERE key = ?"
    found = _transaction(lambda database: database.execute(query, (key,)).fetchone())
    if found is None:
        return None
    used, record, nll, sha256 = found
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        if sha256 == _sha256(key, record, nll):
            restored = restore(json.loads(record), nll)
            _mark_used(table, key, used)
            return restored
    return None


def _mark_used(table: str, key: str, used: int) -> None:
    """Notes that a record was read now, unless that was noted within a day."""
    now = int(time.time())
    if now - used > MARK_SECONDS:
        # A transaction of its own: one that has read cannot wait for its turn to write.
        statement = f"UPDATE {table} SET used = ? WHERE key = ?"
        _transaction(lambda database: database.execute(statement, (now, key)))


def _write(table: str, key: str, record: dict[str, Any], nll: bytes = b"") -> None:
    text = json.dumps(record)
    row = (key, int(time.time()), text, nll, _sha256(key, text, nll))

    def write(database: sqlite3.Connection) -> None:
        database.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?)", row)
        _evict(database)

    _transaction(write)


def _evict(database: sqlite3.Connection) -> None:
    """Removes records unused for `UNUSED_SECONDS`, then the least recently used above the limit.

    SQLite writes the next records where the removed ones were: the file stops growing, and does not
    shrink.
    """
    oldest = int(time.time()) - UNUSED_SECONDS
    for table in _TABLES:
        database.execute(f"DELETE FROM {table} WHERE used < ?", (oldest,))
    limit = cache_limit_bytes() * SHARE_OF_CACHE
    removed = 1
    while removed and _bytes_in_use(database) > limit:
        removed = sum(
            database.execute(
                f"DELETE FROM {table} WHERE key IN (SELECT key FROM {table} ORDER BY used LIMIT ?)",
                (EVICTED_AT_ONCE,),
            ).rowcount
            for table in _TABLES
        )


def _bytes_in_use(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _sha256(key: str, record: str, nll: bytes) -> str:
    return hashlib.sha256(f"{key}\n{record}\n".encode() + nll).hexdigest()


def _transaction(work: Callable[[sqlite3.Connection], Any]) -> Any:
    """The result of `work` in its own transaction, or None where the file cannot be used."""
    path = cache_folder() / "results.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
            inode = path.stat().st_ino
            try:
                _require_schema(database, path)
                with database:
                    database.execute("BEGIN")
                    return work(database)
            except sqlite3.DatabaseError as error:
                damage = getattr(error, "sqlite_errorcode", 0) & 0xFF
                # Another thread or process may have set it aside already.
                if damage in DAMAGE and path.stat().st_ino == inode:
                    _set_aside(path)
    except (sqlite3.Error, OSError):
        pass
    return None


def _require_schema(database: sqlite3.Connection, path: Path) -> None:
    """Makes the tables in a new file or one of an older schema; refuses a newer schema."""
    if _version(database) < SCHEMA_VERSION:
        _enable_wal(database)
        database.execute("BEGIN IMMEDIATE")
        if _version(database) < SCHEMA_VERSION:
            for table in _TABLES:
                if _version(database) < 2:
                    database.execute(f"DROP TABLE IF EXISTS {table}")
                database.execute(_CREATE.format(table=table))
                database.execute(f"CREATE INDEX IF NOT EXISTS {table}_by_use ON {table} (used)")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    database.execute("PRAGMA synchronous = NORMAL")
    if _version(database) != SCHEMA_VERSION:
        _notice(
            f"The results in {path} were kept by a newer version of this program. They are left "
            "alone, and no points are kept until the file is moved away."
        )
        raise sqlite3.NotSupportedError


def _enable_wal(database: sqlite3.Connection) -> None:
    """Turns write-ahead logging on, waiting for other connections as a transaction does.

    SQLite itself does not wait here: it asks for the write lock while it holds the read lock, where
    two connections could wait for each other for ever.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _version(database: sqlite3.Connection) -> int:
    return database.execute("PRAGMA user_version").fetchone()[0]


def _set_aside(path: Path) -> None:
    """Renames a damaged file, and removes the journal files that SQLite keeps beside it."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    _notice(f"The file of kept results was damaged; it was set aside as {aside}.")


def _notice(sentence: str) -> None:
    if sentence not in notices:
        notices.append(sentence)
        logging.getLogger(__name__).warning(sentence)
