"""Fingerprints of files, the cache's place, and what appears on disk whole or not at all.

Writing goes on beside the final name, under a hidden name with a suffix of our own, and ends with a
rename. Whoever writes holds a lock on that hidden name. A process that was killed holds none, so
the next one that writes into the same folder knows its leftovers and removes them.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transact_core.base.errors import TransActError

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers stay: hidden, and never taken for results
    fcntl = None

STAGING_SUFFIX = ".transact-partial"
MAX_NAME_BYTES = 255
MAX_TEXT_BYTES = 200_000_000
"""Of files that are read in one piece; the largest tokenizers take some tens of megabytes."""


def cache_folder() -> Path:
    """Where converted models are kept: `$TRANSACT_CACHE`, or `transact` in the user's cache."""
    if own := os.environ.get("TRANSACT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transact"


def read_text(path: Path) -> str:
    """A file's text, where it is an ordinary file of ordinary size.

    Raises:
        OSError: it is not, or cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT_BYTES + 1) if path.stat().st_size <= MAX_TEXT_BYTES else None
    if raw is None or len(raw) > MAX_TEXT_BYTES:
        raise OSError(f"{path} is larger than {MAX_TEXT_BYTES // 10**6} MB")
    return raw.decode("utf-8")


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def require_free_output(folder: Path) -> None:
    """Refuses an output folder that holds something or cannot be made.

    Called before any computing, so that an hour's work is not lost to a wrong path.
    """
    try:
        final = folder.resolve()
        if final.exists() and not final.is_dir():
            raise TransActError(f"The output {folder} is a file; name a new or empty folder.")
        if final.is_dir() and any(final.iterdir()):
            raise TransActError(
                f"The output folder {folder} is not empty; name a new or empty one."
            )
        # The way there is made and removed again: rights, quotas and odd file systems are known
        # only by trying.
        made = [path for path in (final, *final.parents) if not path.exists()]
        try:
            final.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=final).close()
        finally:
            for path in made:
                if path.is_dir():
                    path.rmdir()
    except (OSError, RuntimeError) as error:
        raise TransActError(
            f"The output folder {folder} cannot be written: {disk_trouble(error) or error}."
        ) from None


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write into, renamed to `final` only when all went well.

    Raises:
        TransActError: the disk filled up or cannot be written; nothing is left behind.
    """
    final = final.resolve()
    made = [path for path in final.parents if not path.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _staged(final, lambda **where: Path(tempfile.mkdtemp(**where))) as staging:
            yield staging
            for path in sorted(staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
                _flush(path)
            staging.chmod(0o755)
            _flush(staging)
            if final.is_dir() and any(final.iterdir()):
                raise TransActError(
                    f"{final} was filled by another process meanwhile; its files are kept, and "
                    "nothing was added."
                )
            if os.name != "posix" and final.is_dir():
                final.rmdir()  # elsewhere a rename takes the place of an empty folder
            staging.rename(final)
            _flush(final.parent)
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if filled := disk_trouble(error):
            raise TransActError(
                f"{final} was not written: {filled}; nothing was left behind."
            ) from None
        raise


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """An empty file beside `final` to write into, put in its place only when all went well.

    Raises:
        OSError: the disk filled up or cannot be written; nothing is left behind.
    """
    final = final.resolve()
    with _staged(final, _empty_file) as staging:
        yield staging
        staging.chmod(0o644)
        _flush(staging)
        os.replace(staging, final)
        _flush(final.parent)


def _empty_file(**where: object) -> Path:
    handle, name = tempfile.mkstemp(**where)
    os.close(handle)
    return Path(name)


@contextmanager
def _staged(final: Path, make: Callable[..., Path]) -> Iterator[Path]:
    """A locked hidden path beside `final`, gone at the end if it was not renamed."""
    remove_leftovers(final.parent)
    room = MAX_NAME_BYTES - len(f"..12345678{STAGING_SUFFIX}")
    prefix = "." + final.name.encode()[:room].decode(errors="ignore") + "."
    lock = None
    while lock is None:
        staging = make(prefix=prefix, suffix=STAGING_SUFFIX, dir=final.parent)
        lock = _lock(staging, wait=True)
    try:
        yield staging
    finally:
        _remove(staging)
        os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder; living ones keep theirs."""
    if fcntl is None:
        return
    with suppress(OSError):
        for path in folder.glob(f".*{STAGING_SUFFIX}"):
            lock = _lock(path, wait=False)
            if lock is not None:
                _remove(path)
                os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """Locks a path against removal by others; None where it is another's, or gone."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    except OSError:
        # Some network file systems know no locks: nothing is removed there by anyone.
        locked = wait
    with suppress(OSError):
        if locked and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    os.close(handle)
    return None


def remove_whole(path: Path) -> None:
    """Removes a file or a folder, which others see whole or not at all; what fails is left there.

    A folder gets a hidden name first. If this process is killed, the next one that writes beside it
    takes it for a leftover and removes it.
    """
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path = path.rename(path.with_name(f".{path.name}.{os.getpid()}{STAGING_SUFFIX}"))
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flush(path: Path) -> None:
    """Has the disk hold what was written, so that a rename never outlives its contents."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_trouble(error: BaseException) -> str | None:
    """What kept a file from being written, or None where the error is of another kind.

    safetensors reports a failed write as its own error, with the system's words in its message.
    """
    words = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission was denied",
        errno.EFBIG: "a file grew past the allowed size",
        errno.EIO: "the disk failed",
        errno.ENAMETOOLONG: "its name is too long",
        errno.ENOTDIR: "a part of its path is a file",
        errno.ENOENT: "its folder cannot be made",
    }
    for number, sentence in words.items():
        same_number = isinstance(error, OSError) and error.errno == number
        if same_number or f"(os error {number})" in str(error):
            return sentence
    return None


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuses a write that the disk under `folder` has no room for."""
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    free = shutil.disk_usage(ancestor).free
    if needed_bytes > free:
        raise TransActError(
            f"Writing {folder} takes {needed_bytes / 1e6:,.0f} MB and the disk has "
            f"{free / 1e6:,.0f} MB free; free some space or name a folder on another disk."
        )
