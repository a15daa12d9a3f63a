"""`transact app`: starts the app from wherever it is installed.

Nothing here imports torch, so that the server is up soon; and nothing here imports Streamlit or the
pages, which are run as a program of their own.
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

from transact_core.base.errors import TransActError

ADDRESS, PORT = "localhost", 8501
"""Where the app listens unless another place is asked for: on this machine only."""
WHAT = "start the app, to be opened in a browser"


class _HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default == argparse.SUPPRESS:
            return action.help
        default = "off" if action.default is False else "%(default)s"
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """The parser of all commands: a wrong argument is one sentence, without a usage text."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _HelpFormatter, **named})

    def error(self, message: str) -> NoReturn:
        raise TransActError(message[0].upper() + message[1:] + "; see --help.")


def _port(text: str) -> int:
    # int() would take signs, underscores and spaces too.
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:6]) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=ADDRESS,
        help=f"address to listen at; {ADDRESS} is reached from this machine only, 0.0.0.0 from "
        "every one: read SECURITY.md before",
    )
    parser.add_argument("--port", type=_port, default=PORT, help="TCP port to listen at")


def app_folder() -> Path:
    """The folder that holds app.py and pages/: inside the installed package, or the clone's root.

    Raises:
        TransActError: it is in neither.
    """
    package = Path(__file__).parent
    for folder in (package / "_app", package.parent):
        if (folder / "app.py").is_file() and (folder / "pages").is_dir():
            return folder
    raise TransActError(
        f"The app's files are not beside {package}; install the package again with pip, or run "
        "`make app` in a clone."
    )


def run(chosen: argparse.Namespace) -> int:
    """Serves the app until it is stopped; returns the exit status."""
    folder = app_folder()
    sys.path.insert(0, str(folder))
    program = runpy.run_module("pages.server.serve")
    return program["serve"](folder / "app.py", chosen.address, chosen.port)
