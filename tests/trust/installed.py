"""Where `make runtimes` installs the other runtimes that exported models are tried in."""

import os
import sys
from pathlib import Path

import pytest

from transact_core.base.errors import TransActError
from transact_core.models.llama_cpp import require_llama_cpp

FOLDERS = {
    "llama_cpp": "runtimes",
    "ctranslate2": "runtimes",
    "transformers": "transformers-4",
}
"""Folder in .venv by runtime."""


def runtime_folder(runtime: str) -> Path:
    """The folder of a runtime; without it what asks fails in CI, and is skipped elsewhere."""
    folder = Path(sys.prefix) / FOLDERS[runtime]
    if not (folder / ".setup").exists():
        missing = f"{folder} is not there; `make runtimes` installs it"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing, allow_module_level=True)
    return folder


def require_llama_cpp_installed() -> None:
    """Without the optional package what asks fails in CI, and is skipped elsewhere."""
    try:
        require_llama_cpp()
    except TransActError as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing), allow_module_level=True)
