"""What the teacher says of each token, written down once: its most likely tokens and the rest.

Of every scored token the k most likely next tokens are kept, with their log-probabilities, and the
mass of all others, the tail. Training on that holds one model, and a later training on the same
windows needs no pass of the teacher at all. A window is found by the SHA-256 of its token ids, so
that a longer training finds those of a shorter one.

A store is a folder of plain arrays that are read as memory maps. Rows are appended window by
window, and the window's SHA-256 last, so that a process that is killed loses the row it was at.
Several processes may write into one store.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from transact_core.base.cache import mark_used
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import cache_folder, disk_trouble, locked, require_disk_space
from transact_core.data.windows import Windows
from transact_core.training.objective import Targets, TopTargets, scored_states, top_of

TOP = 64
"""Tokens that are kept of each distribution where no number is given."""
WRITING = "Writing down the teacher"
"""The stage of progress."""
HASH_BYTES = 32
SMALL_VOCABULARY = 1 << 16
"""Below it a token id takes two bytes."""


@dataclass(frozen=True)
class Shape:
    """What decides how many bytes a window takes."""

    sequence_length: int
    vocab_size: int
    top: int = TOP

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By name, the type of numbers and the shape of one window's row."""
        scored = self.sequence_length - 1
        ids = "<u2" if self.vocab_size <= SMALL_VOCABULARY else "<i4"
        return {
            "tokens": (ids, (scored, self.top)),
            "log_p": ("<f2", (scored, self.top)),
            "tail": ("<f4", (scored,)),
            "nll": ("<f4", (scored,)),
        }

    @property
    def bytes_of_window(self) -> int:
        sizes = (np.dtype(kind).itemsize * int(np.prod(row)) for kind, row in self.arrays.values())
        return HASH_BYTES + sum(sizes)

    def bytes_of(self, windows: int) -> int:
        return windows * self.bytes_of_window


def folder_in_cache() -> Path:
    """Where stores are kept in the cache folder, and go as other things do that are kept there."""
    return cache_folder() / "teacher"


class TeacherCache:
    """The store of one teacher for windows of one length; a `Teacher` for the windows it knows."""

    def __init__(self, folder: Path, teacher: Mapping[str, str], dtype: str, shape: Shape) -> None:
        key = {
            "weights": sorted(teacher.values()),
            "dtype": dtype,
            "sequence_length": shape.sequence_length,
            "top": shape.top,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        self.folder, self.shape = folder / name, shape
        self._rows = self._known()
        self._texts: dict[str, list[bytes]] = {}
        self._maps: dict[str, np.memmap] = {}

    def missing(self, texts: Mapping[str, Windows]) -> int:
        """How many different windows are not written down yet."""
        hashes = {digest for windows in texts.values() for digest in map(_hash, windows.ids)}
        return len(hashes - self._rows.keys())

    def write(
        self, model: PreTrainedModel, texts: Mapping[str, Windows], progress: Progress = silent
    ) -> None:
        """Writes down what is missing for these texts, by name; then they can be asked for.

        Raises:
            TransActError: the disk has no room, or fails; what is written already is kept.
        """
        self._rows = self._known()
        left = self.missing(texts)
        require_disk_space(self.folder, self.shape.bytes_of(left))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            done = 0
            for windows in texts.values():
                for ids in windows.ids:
                    if _hash(ids) not in self._rows:
                        progress(WRITING, done, left)
                        mark_used(self.folder)
                        self._append(ids, self._row(model, ids))
                        done += 1
        except OSError as error:
            raise TransActError(
                f"The teacher could not be written down in {self.folder}: "
                f"{disk_trouble(error) or error}; what is there is kept and used again."
            ) from None
        self.open(texts)

    def open(self, texts: Mapping[str, Windows]) -> None:
        """Makes these texts known by name; all their windows are written down."""
        mark_used(self.folder)
        self._rows = self._known()
        self._texts = {name: [_hash(ids) for ids in text.ids] for name, text in texts.items()}
        rows = len(self._rows)
        self._maps = {
            name: np.memmap(self._path(name), dtype=kind, mode="r", shape=(rows, *row))
            for name, (kind, row) in self.shape.arrays.items()
        }

    def targets(self, text: str, rows: list[int], ids: torch.Tensor) -> Targets:
        places = [self._rows[self._texts[text][row]] for row in rows]
        tokens, log_p, tail = (self._of(name, places, ids) for name in ("tokens", "log_p", "tail"))
        return TopTargets(tokens.long(), log_p, tail)

    def nll(self, text: str, rows: list[int], ids: torch.Tensor) -> torch.Tensor:
        places = [self._rows[self._texts[text][row]] for row in rows]
        return self._of("nll", places, torch.empty(0))

    def _of(self, name: str, places: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        read = self._maps[name][list(places)]
        whole = read.astype(np.int64) if name == "tokens" else read.astype(np.float32)
        return torch.from_numpy(whole).flatten(0, 1).to(ids.device)

    @torch.no_grad()
    def _row(self, model: PreTrainedModel, ids: torch.Tensor) -> dict[str, np.ndarray]:
        placed = ids[None].long().to(model.device)
        states, following = scored_states(model, placed)
        tokens, log_p, tail, nll = top_of(model, states, following, self.shape.top)
        parts = {"tokens": tokens, "log_p": log_p, "tail": tail, "nll": nll}
        return {
            name: parts[name].cpu().numpy().astype(kind)
            for name, (kind, _) in self.shape.arrays.items()
        }

    def _append(self, ids: torch.Tensor, row: Mapping[str, np.ndarray]) -> None:
        path = self._path("windows")
        with locked(path):
            if path.stat().st_size // HASH_BYTES != len(self._rows):
                # Another process has written meanwhile.
                self._rows = self._known()
            if _hash(ids) in self._rows:
                return
            place = len(self._rows)
            for name, values in row.items():
                _write_at(self._path(name), place * values.nbytes, values.tobytes())
            _write_at(path, place * HASH_BYTES, _hash(ids))
            self._rows[_hash(ids)] = place

    def _known(self) -> dict[bytes, int]:
        """The place of each window that is wholly written down."""
        path = self._path("windows")
        stored = path.read_bytes() if path.is_file() else b""
        count = len(stored) // HASH_BYTES
        return {
            stored[place * HASH_BYTES : (place + 1) * HASH_BYTES]: place for place in range(count)
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"


def _hash(ids: torch.Tensor) -> bytes:
    return hashlib.sha256(ids.int().contiguous().numpy().tobytes()).digest()


def _write_at(path: Path, offset: int, content: bytes) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.lseek(handle, offset, os.SEEK_SET)
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
