"""The command line that the scripts of this folder share.

    python SCRIPT.py REQUESTS.json ANSWERS.json

Requests and answers go by name; what is refused is answered with its error. It imports nothing of
this repository, so that it runs beside packages that the app cannot use.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path


def run(answer: Callable[..., dict], refusals: tuple[type[Exception], ...] = (Exception,)) -> None:
    """Answers each request by `answer(**request)`; other errors than `refusals` end the script."""
    requests = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for name, request in requests.items():
        try:
            answers[name] = answer(**request)
        except refusals as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(answers))
