"""Fingerprints of files, the cache's place, and folders that appear whole or not at all."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transact_core.errors import TransActError


def cache_folder() -> Path:
    """Where converted models are kept: `$TRANSACT_CACHE`, or `transact` in the user's cache."""
    if own := os.environ.get("TRANSACT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transact"


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
            f"The output folder {folder} cannot be written: {_disk_trouble(error) or error}."
        ) from None


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write into, renamed to `final` only when all went well.

    Raises:
        TransActError: the disk filled up or cannot be written; nothing is left behind.
    """
    final = final.resolve()
    made = [path for path in final.parents if not path.exists()]
    staging = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        staging.chmod(0o755)
        if final.is_dir():
            final.rmdir()
        staging.rename(final)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if filled := _disk_trouble(error):
            raise TransActError(
                f"{final} was not written: {filled}; nothing was left behind."
            ) from None
        raise


def _disk_trouble(error: BaseException) -> str | None:
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
