"""Uploaded texts on disk: by fingerprint, with harmless names, within a limit of size."""

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
"""Characters of a stored file's name, without its ending."""
KINDS = ("txt", "md", "jsonl", "parquet")


def harmless_name(name: str) -> str:
    """A file name made from the one that the browser sent: letters, digits and a known ending.

    Raises:
        TransActError: its ending is none of `KINDS`.
    """
    stem, _, kind = name.replace("\\", "/").rpartition("/")[2].rpartition(".")
    if kind.lower() not in KINDS:
        raise TransActError(f"The upload is none of .{', .'.join(KINDS)}; save it as one of these.")
    stem = re.sub(r"[^\w-]+", "-", stem, flags=re.ASCII)[:LONGEST_NAME].strip("-")
    return f"{stem or 'text'}.{kind.lower()}"


def keep_upload(name: str, content: bytes, total_mb: int) -> str:
    """Stores an uploaded text and returns its path as a source; the oldest uploads are removed.

    Raises:
        TransActError: its name is not that of a text, it is larger than `total_mb`, or it could not
            be written.
    """
    if len(content) > total_mb * 1_000_000:
        raise TransActError(
            f"The upload is larger than the {total_mb:,} MB that are kept of all uploads together; "
            "upload a part of it."
        )
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
        raise TransActError(f"The upload was not stored: {error.strerror}.") from None
    _make_room(path.parent, total_mb * 1_000_000)
    return str(path)


def _make_room(newest: Path, total_bytes: int) -> None:
    """Removes whole uploads, the longest unused first, until the rest is within the total."""
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
