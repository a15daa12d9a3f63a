"""Uploaded texts on disk: under their fingerprints, their names made harmless, no more than fit."""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from pages.server.settings import uploads_folder
from transact_core.base.errors import TransActError
from transact_core.base.files import staged_file

LONGEST_NAME = 80
KINDS = ("txt", "md", "jsonl", "parquet")


def harmless_name(name: str) -> str:
    """A file name made of the one the browser told: letters, digits, and a known ending.

    Raises:
        TransActError: it ends like none of the texts that are read.
    """
    stem, _, kind = name.replace("\\", "/").rpartition("/")[2].rpartition(".")
    if kind.lower() not in KINDS:
        raise TransActError(f"The upload is none of .{', .'.join(KINDS)}; save it as one of these.")
    stem = re.sub(r"[^\w-]+", "-", stem, flags=re.ASCII)[:LONGEST_NAME].strip("-")
    return f"{stem or 'text'}.{kind.lower()}"


def keep_upload(name: str, content: bytes, total_mb: int) -> str:
    """Stores an uploaded text and gives its path as a source; the oldest others make room.

    Raises:
        TransActError: its name is not that of a text, it alone is over the total, or the disk
            takes no more.
    """
    if len(content) > total_mb * 1_000_000:
        raise TransActError(f"The upload has more than the {total_mb:,} MB kept of all uploads.")
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = uploads_folder() / digest / harmless_name(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            # Renamed when it is whole: another visitor may be uploading the same.
            with staged_file(path) as staging:
                staging.write_bytes(content)
        os.utime(path.parent)
    except OSError as error:
        raise TransActError(f"The upload was not kept: {error.strerror}.") from None
    _make_room(path.parent, total_mb * 1_000_000)
    return str(path)


def _make_room(newest: Path, total_bytes: int) -> None:
    """Removes whole uploads, the longest unused first, until all of them are within the total."""
    sizes = {}
    for folder in newest.parent.iterdir():
        # Another session may be making room as well.
        with suppress(OSError):
            files = [path.stat().st_size for path in folder.iterdir()]
            sizes[folder] = (folder.stat().st_mtime_ns, sum(files))
    total = sum(size for _, size in sizes.values())
    for folder, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total <= total_bytes:
            return
        if folder != newest:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
