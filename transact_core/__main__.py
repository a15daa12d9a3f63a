"""`python -m transact_core`, which is the command `transact` as well."""

import sys

from transact_core import start_app
from transact_core.base.errors import TransActError


def main() -> int:
    """Runs the command of `sys.argv`; returns the exit status."""
    if sys.argv[1:2] == ["app"]:
        return _start_app()
    # Imported late: the other commands need torch, and the app's server is up before it is loaded.
    from transact_core.base.memory import give_large_blocks_back
    from transact_core.cli import main as run_command

    give_large_blocks_back()
    return run_command()


def _start_app() -> int:
    parser = start_app.Parser(prog="transact app", description=f"{start_app.WHAT.capitalize()}.")
    start_app.add_arguments(parser)
    try:
        return start_app.run(parser.parse_args(sys.argv[2:]))
    except TransActError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
