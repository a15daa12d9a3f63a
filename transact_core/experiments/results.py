"""Measured points kept on disk between runs, so that nothing is measured twice.

One SQLite file in the cache folder holds them, each under the SHA-256 of all that determined it:
the bench, the cut, and what `store.digest` adds. A point belongs to the cut, not to the ratios that
asked for it; how `auto` and steps decided from ratios is kept beside the points.

Keeping is a convenience and never in the way: every access is one short transaction on a connection
of its own, each record carries its own SHA-256, and where the file cannot be read or written the
point is measured and not kept. A damaged file is set aside. Journalling (WAL) lets several
processes read while one writes, and a kill at any moment costs at most the record being written.
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
from transformers import LlamaForCausalLM

from transact_core.base.cache import digest
from transact_core.base.errors import Progress, silent
from transact_core.base.files import cache_folder
from transact_core.experiments.bench import Bench, Choices, Measurement, compress
from transact_core.experiments.decide import decide
from transact_core.forward.perplexity import Evaluation
from transact_core.models.footprint import Footprint
from transact_core.pruning.closed_form import LayerFit
from transact_core.pruning.plan import Decision, PruningPlan

SCHEMA_VERSION = 1
BUSY_SECONDS = 10
"""How long a transaction waits for another one to end."""
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DECISION = TypeAdapter(Decision)
_TABLE = "CREATE TABLE {} (key TEXT PRIMARY KEY, record TEXT, nll BLOB, sha256 TEXT) WITHOUT ROWID"
_POINTS, _DECISIONS = "points", "decisions"

notices: list[str] = []
"""One sentence for each file of results that could not be used, for the page and the log."""

Compress = Callable[[Bench, PruningPlan, str, Progress], tuple[LlamaForCausalLM, Measurement]]


def measured(
    bench: Bench,
    decision: Decision,
    recovery: str,
    progress: Progress = silent,
    compress: Compress = compress,
) -> Measurement:
    """The point of a cut: as kept from an earlier run, or else measured now and kept.

    Raises:
        TransActError: as `compress`, which is called only where the point is not known.
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
    """What `decide` decides, kept where that takes more than one set of scores.

    Raises:
        TransActError: as `decide` does.
    """
    known = find_decision(bench, mha_ratio, mlp_ratio, choices, progress)
    if known is None:
        known = decide(bench, mha_ratio, mlp_ratio, choices, progress)
        key = _decision_key(bench, mha_ratio, mlp_ratio, choices)
        _write(_DECISIONS, key, _DECISION.dump_python(known))
    return known


def find_decision(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    progress: Progress = silent,
) -> Decision | None:
    """The decision for these ratios where none of its models need be made anew, or None."""
    if choices.single_pass:
        return decide(bench, mha_ratio, mlp_ratio, choices, progress)
    return _read(
        _DECISIONS,
        _decision_key(bench, mha_ratio, mlp_ratio, choices),
        lambda record, _: _DECISION.validate_python(record),
    )


def find(bench: Bench, decision: Decision, recovery: str) -> Measurement | None:
    """The kept point of this cut, whatever asked for it then, or None; `seconds` are its making's.

    The decision is the one given: it tells how this cut was asked for now.
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

    return _read(_POINTS, _point_key(bench, decision.plan, recovery), restored)


def keep(bench: Bench, point: Measurement) -> None:
    """Keeps a point where that can be done."""
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
    key = _point_key(bench, point.plan, point.recovery)
    _write(_POINTS, key, record, nll.numpy().astype(np.float32).tobytes())


# --- keys ------------------------------------------------------------------------------------


def _point_key(bench: Bench, plan: PruningPlan, recovery: str) -> str:
    cut = {
        "layers": [layer.model_dump(mode="json") for layer in plan.layers],
        "slots": plan.slots,
        "importance": plan.importance,
        "recovery": recovery,
    }
    return digest({"bench": bench.identity, "cut": cut})


def _decision_key(bench: Bench, mha_ratio: float, mlp_ratio: float, choices: Choices) -> str:
    asked = {"mha_ratio": mha_ratio, "mlp_ratio": mlp_ratio, **asdict(choices)}
    return digest({"bench": bench.identity, "asked": asked})


# --- the file --------------------------------------------------------------------------------


def _read(table: str, key: str, restore: Callable[[dict[str, Any], bytes], Any]) -> Any:
    """What `restore` makes of a kept record, or None where there is none that is whole."""
    question = f"SELECT record, nll, sha256 FROM {table} WHERE key = ?"
    found = _transaction(lambda database: database.execute(question, (key,)).fetchone())
    if found is None:
        return None
    record, nll, sha256 = found
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        if sha256 == _sha256(key, record, nll):
            return restore(json.loads(record), nll)
    return None


def _write(table: str, key: str, record: dict[str, Any], nll: bytes = b"") -> None:
    text = json.dumps(record)
    row = (key, text, nll, _sha256(key, text, nll))
    statement = f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)"
    _transaction(lambda database: database.execute(statement, row))


def _sha256(key: str, record: str, nll: bytes) -> str:
    return hashlib.sha256(f"{key}\n{record}\n".encode() + nll).hexdigest()


def _transaction(work: Callable[[sqlite3.Connection], Any]) -> Any:
    """What `work` gives in a transaction of its own, or None where the file cannot be used."""
    path = cache_folder() / "results.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
            opened = path.stat().st_ino
            try:
                _require_schema(database, path)
                with database:
                    database.execute("BEGIN")
                    return work(database)
            except sqlite3.DatabaseError as error:
                damage = getattr(error, "sqlite_errorcode", 0) & 0xFF
                # Another thread or process may have set it aside already.
                if damage in DAMAGE and path.stat().st_ino == opened:
                    _set_aside(path)
    except (sqlite3.Error, OSError):
        pass
    return None


def _require_schema(database: sqlite3.Connection, path: Path) -> None:
    """Makes the tables of a new file; refuses those of another version."""
    if _version(database) == 0:
        _keep_a_journal(database)
        database.execute("BEGIN IMMEDIATE")
        if _version(database) == 0:
            for table in (_POINTS, _DECISIONS):
                database.execute(_TABLE.format(table))
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    database.execute("PRAGMA synchronous = NORMAL")
    if _version(database) != SCHEMA_VERSION:
        _notice(
            f"The results in {path} were kept by another version of this program; they are left "
            "alone, and points are not kept until the file is moved away."
        )
        raise sqlite3.NotSupportedError


def _keep_a_journal(database: sqlite3.Connection) -> None:
    """Turns WAL on, waiting for others as a transaction does.

    SQLite itself does not wait here: it asks for the write lock while it holds the read lock, where
    two that wait for each other would never end.
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
    """Moves a damaged file out of the way, with what SQLite keeps beside it."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    _notice(f"The file of kept results was damaged; it was set aside as {aside}.")


def _notice(sentence: str) -> None:
    if sentence not in notices:
        notices.append(sentence)
        logging.getLogger(__name__).warning(sentence)
