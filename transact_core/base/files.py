"""Checksums of files, the cache folder, and files and folders that appear whole or not at all.

An output is written beside its final name, under a hidden name with our own suffix, and renamed
when it is complete. The writer holds a lock on the hidden name. A process that was killed holds no
lock, so the next process that writes into the same folder recognises its leftovers and removes
them.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from transact_core.base.errors import TransActError

try:
    import fcntl
except ImportError:  # Windows: leftovers stay there, hidden and never taken for results.
    fcntl = None

STAGING_SUFFIX = ".transact-partial"
"""Suffix of the hidden names of unfinished files and folders."""
MAX_NAME_BYTES = 255
"""Longest file name that common file systems take, in bytes."""
MAX_TEXT_BYTES = 200_000_000
"""Largest file that is read in one piece, in bytes; the largest tokenizers take some 10^7."""

CACHE_LIMIT = "TRANSACT_CACHE_GB"
"""Environment variable: the most that the cache folder may hold, in gigabytes (10^9 bytes)."""
DEFAULT_CACHE_GB = 20.0
"""Room for a converted 7B model in float16 (14 GB) and thousands of measurements."""


def cache_folder() -> Path:
    """The folder of kept results: `$TRANSACT_CACHE`, or `transact` in the user's cache folder."""
    if own := os.environ.get("TRANSACT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transact"


def cache_limit_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The most that the cache folder may hold, from `TRANSACT_CACHE_GB`.

    Raises:
        TransActError: the variable is set and is not a positive decimal number.
    """
    value = environment.get(CACHE_LIMIT, str(DEFAULT_CACHE_GB))
    # float() would also take "inf", "1e3" and underscores.
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value, re.ASCII) or not float(value):
        raise TransActError(
            f"{CACHE_LIMIT} is {value!r}; set it to a positive number of gigabytes, such as 20 "
            "or 0.5."
        )
    return round(float(value) * 10**9)


def expanded(path: str) -> Path:
    """The path with `~` as the user's home, where there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file of at most `MAX_TEXT_BYTES`.

    Raises:
        OSError: it is no regular file, is larger, or cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT_BYTES + 1) if path.stat().st_size <= MAX_TEXT_BYTES else None
    if raw is None or len(raw) > MAX_TEXT_BYTES:
        raise OSError(f"{path} is larger than {MAX_TEXT_BYTES // 10**6} MB")
    return raw.decode("utf-8-sig")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def require_free_output(folder: Path) -> None:
    """Refuses an output folder that is not empty or cannot be written.

    Called before anything is computed, so that no work is lost to a wrong path.

    Raises:
        TransActError: the folder is not empty, is a file, or cannot be written.
    """
    try:
        final = folder.resolve()
        if final.exists() and not final.is_dir():
            raise TransActError(f"The output {folder} is a file; name a new or empty folder.")
        if final.is_dir() and any(final.iterdir()):
            raise TransActError(
                f"The output folder {folder} is not empty; name a new or empty one."
            )
        # The folders are made and removed again: only an attempt shows whether rights, quotas and
        # the file system allow it.
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


def require_new_file(path: Path, needs_folder: bool = True) -> None:
    """Refuses an output file that exists, cannot be looked at, or has no folder.

    Raises:
        TransActError: so; with `needs_folder` also where the folder does not exist yet.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TransActError(
            f"The output {path} cannot be written: {disk_trouble(error) or error.strerror}."
        ) from None
    else:
        raise TransActError(f"The output {path} exists; name a new file.")
    if needs_folder and not path.absolute().parent.is_dir():
        raise TransActError(f"The folder of {path} does not exist.")


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write into; it is renamed to `final` if no error occurred.

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
                final.rmdir()  # On POSIX systems the rename replaces an empty folder.
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
    """An empty file beside `final` to write into; it replaces `final` if no error occurred.

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
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder in the cache folder for files that are not kept, removed at the end.

    It has a hidden name with `name` in it. What a killed process left is removed by the next one.
    """
    final = cache_folder() / name
    final.parent.mkdir(parents=True, exist_ok=True)
    with _staged(final, lambda **where: Path(tempfile.mkdtemp(**where))) as folder:
        yield folder


@contextmanager
def _staged(final: Path, make: Callable[..., Path]) -> Iterator[Path]:
    """A locked hidden path beside `final`; removed at the end if it was not renamed."""
    remove_leftovers(final.parent)
    free_bytes = MAX_NAME_BYTES - len(f"..12345678{STAGING_SUFFIX}")
    prefix = "." + final.name.encode()[:free_bytes].decode(errors="ignore") + "."
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
    """Removes unfinished files that killed processes left in a folder; running ones keep theirs."""
    if fcntl is None:
        return
    with suppress(OSError):
        for path in folder.glob(f".*{STAGING_SUFFIX}"):
            lock = _lock(path, wait=False)
            if lock is not None:
                _remove(path)
                os.close(lock)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file, which is made if it is missing, against other processes that do the same."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            # Some network file systems have no locks.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock(path: Path, wait: bool) -> int | None:
    """Locks a path against removal by other processes.

    Gives the handle that holds the lock, or None if another process holds it or the path is gone.
    """
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
        # Some network file systems have no locks: there no process removes leftovers.
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
    """Writes a path's contents to the disk, so that no rename is stored before them."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_trouble(error: BaseException) -> str | None:
    """The reason why a file could not be written, as a clause, or None for other errors.

    safetensors raises its own error for a failed write, with the system's message in it.
    """
    reasons = {
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
    for code, reason in reasons.items():
        same_code = isinstance(error, OSError) and error.errno == code
        if same_code or f"(os error {code})" in str(error):
            return reason
    return None


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuses a write of `needed_bytes` for which the disk of `folder` has no room.

    Raises:
        TransActError: the disk has less free space.
    """
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    free = shutil.disk_usage(ancestor).free
    if needed_bytes > free:
        raise TransActError(
            f"Writing {folder} takes {needed_bytes / 1e6:,.0f} MB and the disk has "
            f"{free / 1e6:,.0f} MB free; free some space or name a folder on another disk."
        )
