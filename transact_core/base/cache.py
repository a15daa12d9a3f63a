"""Measured tensors kept on disk between runs, keyed by all that determined them.

The cache folder holds five kinds of entries: measured tensors (`measured/*.safetensors`), models
converted from GGUF (`models/*/`), texts that models wrote (`generated/*.txt`), what dense models
say of texts that are trained on (`teacher/*/`), and the SQLite file of measured points, which
`experiments.results` writes. `evict` bounds their age and their size.
Uploads have a limit of their own, and cuts with their trainings (`trainings/*/*/`) have none but
their age: hours of work are in them, and whoever began them can remove them.

Why not the `diskcache` package: it reads its entries with pickle by default, which lets whoever can
write to the folder run code (CVE-2025-69872, unfixed in its last release 5.6.3 of August 2023).
Entries here are safetensors files and JSON, both checked by SHA-256, and nothing is unpickled.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transact_core.base.files import cache_folder, cache_limit_bytes, remove_whole, staged_file

ENGINE_VERSION = 4
"""Version of the numbers that the library computes; part of the key of every kept result.

The rule: raise it by one with every change after which a kept result (scores, plans, repaired
weights, losses, damage curves, token ids of a text) differs by more than rounding, and leave it
alone otherwise. The package's own version plays no part, and what is converted from GGUF files has
`models.gguf.CONVERSION`.
`tests/trust/test_engine_version.py` holds the library to this: it repeats a small computation that
was recorded together with this version.
"""

UNUSED_SECONDS = 90 * 24 * 3600
"""Entries that nobody read for this long are removed, whatever the size of the cache."""
MODEL_IN_USE_SECONDS = 3600
"""A folder used within this time is kept even above the limit: another process may still be loading
a model's files one by one, or writing. A measured file needs no such time, as it is opened once."""
_folders_in_use: set[Path] = set()
"""Models' folders that this process has opened: an export reads further files from them."""

Tensors = dict[str, torch.Tensor]


def remembered(key: dict[str, object], compute: Callable[[], Tensors]) -> Tensors:
    """The kept result under this key, or else the result of `compute`, which is then kept.

    `key` is as `digest` takes it. A damaged file is computed anew. Where the cache folder cannot be
    written, the result is computed each time.

    Raises:
        TransActError: `TRANSACT_CACHE_GB` is not a number; raised before anything is computed.
    """
    limit = cache_limit_bytes()
    name = digest(key)
    path = cache_folder() / "measured" / f"{name}.safetensors"
    tensors = _read(path, name)
    if tensors is None:
        tensors = compute()
        _keep(path, name, tensors)
        evict(limit)
    else:
        mark_used(path)
    return tensors


def digest(key: dict[str, object]) -> str:
    """SHA-256 of everything that determined a result, as hexadecimal digits.

    `key` must be JSON and name everything that the result depends on, apart from what is added
    here: `ENGINE_VERSION`, the versions of torch and transformers, the number of threads and the
    processor's instruction set.
    """
    determined_by = key | {
        "engine": ENGINE_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()


def sha256_of_tokens(ids: torch.Tensor) -> str:
    """SHA-256 of token ids and of how they are cut into windows."""
    shape = str(tuple(ids.shape)).encode()
    return hashlib.sha256(shape + ids.cpu().long().contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path, name: str) -> Tensors | None:
    """The tensors of a kept file, or None where there is no such file or it is damaged."""
    with suppress(OSError, SafetensorError, ValueError, RuntimeError):
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if expected == _sha256(name, tensors):
            return tensors
    return None


def _keep(path: Path, name: str, tensors: Tensors) -> None:
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                staging,
                metadata={"sha256": _sha256(name, tensors)},
            )


def _sha256(name: str, tensors: Tensors) -> str:
    """SHA-256 of an entry's name and of its tensors, in the order of their names."""
    checksum = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        checksum.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        checksum.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()


# --- the limit -------------------------------------------------------------------------------


def mark_used(path: Path) -> None:
    """Notes that an entry was read now; the last use decides what `evict` removes first."""
    with suppress(OSError):
        os.utime(path)


def mark_in_use(folder: Path) -> None:
    """Notes that this process reads a model's folder: `evict` in this process never removes it."""
    _folders_in_use.add(folder.absolute())
    mark_used(folder)


def evict(limit: int | None = None) -> None:
    """Removes entries unused for `UNUSED_SECONDS`, then the least recently used above the limit.

    `limit` is in bytes, by default that of the environment. Models that are in use, or were within
    `MODEL_IN_USE_SECONDS`, stay and do not count towards it. Any number of processes may do this at
    the same time, while others read: a file that is open stays readable until it is closed, and
    whoever finds an entry gone computes it again.

    Raises:
        TransActError: `TRANSACT_CACHE_GB` is not a number.
    """
    limit = cache_limit_bytes() if limit is None else limit
    now = time.time()
    for path in cache_folder().glob("trainings/*/*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > UNUSED_SECONDS:
                remove_whole(path)
    removable = [
        (path, last_used, size)
        for path, last_used, size in sorted(_entries(), key=lambda entry: entry[1])
        if path.absolute() not in _folders_in_use
        and not (path.is_dir() and now - last_used < MODEL_IN_USE_SECONDS)
    ]
    total = sum(size for _, _, size in removable)
    for path, last_used, size in removable:
        if now - last_used > UNUSED_SECONDS or total > limit:
            remove_whole(path)
            total -= size


def _entries() -> Iterator[tuple[Path, float, int]]:
    """What may be removed: each path with its last use (Unix time) and its size in bytes.

    The file of points in use is not among them: it removes single points itself.
    """
    folder = cache_folder()
    patterns = (
        "measured/*.safetensors",
        "models/*",
        "generated/*.txt",
        "teacher/*",
        "results.sqlite.damaged-*",
    )
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        # Hidden names are being written. Another process may remove an entry at any moment.
        if path.name.startswith("."):
            continue
        with suppress(OSError):
            files = [path, *path.rglob("*")] if path.is_dir() else [path]
            yield path, path.stat().st_mtime, sum(file.lstat().st_size for file in files)
