"""The licence of a source model, as its folder states it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load

from transact_core.base.files import read_text

LICENCE_FILES = (
    "LICENSE*",
    "LICENCE*",
    "License*",
    "license*",
    "COPYING*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
)
"""Patterns of the names of files that licences ask to be passed on."""
LONGEST_FIELD = 300
"""Characters of a field of the front matter; a longer one is no name and no link."""


@dataclass(frozen=True)
class Licence:
    """The fields of a model card's front matter; None where one is not stated."""

    identifier: str | None
    """`license`, such as `apache-2.0`, `llama3.2` or `other`."""
    name: str | None = None
    """`license_name`, where the identifier is `other`."""
    link: str | None = None
    """`license_link`: an address, or the name of a file in the folder."""


def read_licence(folder: Path) -> Licence | None:
    """The licence that the front matter of a folder's README.md states, None where none does."""
    readme = folder / "README.md"
    with suppress(Exception):  # whatever a parser makes of a file that anybody wrote
        read_text(readme)
        stored = metadata_load(readme) or {}
        licence = Licence(*(_field(stored, f"license{part}") for part in ("", "_name", "_link")))
        if licence.identifier or licence.name:
            return licence
    return None


def _field(stored: dict, name: str) -> str | None:
    value = stored.get(name)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_FIELD:
        return None
    return value if value.isprintable() else None


def licence_files(folder: Path) -> list[Path]:
    """The files of a folder that licences ask to be passed on, by name."""
    found = {path for pattern in LICENCE_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())
