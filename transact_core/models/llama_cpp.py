"""llama.cpp as a runtime: it runs GGUF files and quantises weights.

The library is the one in the optional package `xllamacpp`. It is loaded in a child process, never
in this one, so that a crash of native code, as damaged files can cause, ends in one sentence.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from transact_core.base.errors import TransActError
from transact_core.models import llama_cpp_worker
from transact_core.models.llama_cpp_worker import receive, send

PACKAGE = "xllamacpp"
LIBRARIES = ("xllamacpp*.so", "xllamacpp*.pyd")
"""Patterns of the file that holds llama.cpp, by system."""


@dataclass(frozen=True)
class OpenedFile:
    """What llama.cpp says of a GGUF file that it has loaded."""

    seconds: float
    """Time that loading took."""
    vocab_size: int
    parameters: int
    """Number of weights, rotary factors among them."""
    description: str
    """Such as `llama 135M Q4_K - Medium`."""


def llama_cpp_version() -> str | None:
    """The version of the package that holds llama.cpp; None where it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def runtime_name() -> str:
    """llama.cpp and the package that it came in, for reports and model cards."""
    return f"llama.cpp ({PACKAGE} {llama_cpp_version()})"


def default_threads() -> int:
    """Threads that llama.cpp computes with: `OMP_NUM_THREADS`, or all cores of this process."""
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    with suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_llama_cpp() -> Path:
    """The library's file.

    Raises:
        TransActError: it is not installed.
    """
    found = find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        for pattern in LIBRARIES:
            for path in Path(folder).glob(pattern):
                return path
    raise TransActError(
        "llama.cpp is not installed here: run `make llama-cpp` in a clone, or "
        "`pip install 'transact-workbench[llama-cpp]'`."
    )


class LlamaCpp:
    """llama.cpp in a child process, with one model opened at most. Made by `running`."""

    def __init__(self, process: subprocess.Popen, threads: int) -> None:
        self._process, self.threads = process, threads
        self._doing = "starting"

    def open(self, path: Path, context_length: int, exact: bool = False) -> OpenedFile:
        """Loads a GGUF file for texts of up to `context_length` tokens.

        With `exact`, attention is computed as transformers does it, unfused and with keys and
        values in float32; without, as llama.cpp does by default.

        Raises:
            TransActError: llama.cpp cannot read the file, or crashes on it.
        """
        self._doing = f"reading {path}"
        header, _ = self._ask(
            {
                "ask": "open",
                "path": str(path.absolute()),
                "context_length": context_length,
                "exact": exact,
            }
        )
        self._doing = f"running {path}"
        return OpenedFile(**header)

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """The loss in nats of each token after the first, of one window fed alone, float32."""
        _, payload = self._ask({"ask": "losses"}, np.asarray(ids, dtype=np.int32).tobytes())
        return np.frombuffer(payload, dtype=np.float32)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of one window fed alone, shape (tokens, vocabulary), float32."""
        _, payload = self._ask({"ask": "logits"}, np.asarray(ids, dtype=np.int32).tobytes())
        return np.frombuffer(payload, dtype=np.float32).reshape(len(ids), -1)

    def feed(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits after the last of these tokens, shape (vocabulary,), float32.

        They go on from `position` tokens that were fed before; 0 begins a new text.
        """
        _, payload = self._ask(
            {"ask": "feed", "position": position}, np.asarray(ids, dtype=np.int32).tobytes()
        )
        return np.frombuffer(payload, dtype=np.float32)

    def time(self, ids: np.ndarray, new_tokens: int) -> tuple[float, float]:
        """Seconds of a prompt, and seconds for each token decoded greedily after it."""
        header, _ = self._ask(
            {"ask": "time", "new_tokens": new_tokens}, np.asarray(ids, dtype=np.int32).tobytes()
        )
        return header["prefill"], header["decode"]

    def peak_bytes(self) -> int | None:
        """The most memory the process has held, mapped weights included, in bytes."""
        return self._ask({"ask": "memory"})[0]["peak_bytes"]

    def quantise(
        self, weights: np.ndarray, ggml_type: int, importance: np.ndarray | None = None
    ) -> bytes:
        """A matrix in another type, as it lies in a GGUF file.

        `weights` has shape (rows, columns); `importance` has a value for each column, the mean
        square of the input that it multiplies. `ggml_type` is a number of `enum ggml_type`.

        Raises:
            TransActError: the weights cannot be represented in that type.
        """
        self._doing = "quantising"
        rows, columns = weights.shape
        payload = np.ascontiguousarray(weights, dtype=np.float32).tobytes()
        if importance is not None:
            payload += np.asarray(importance, dtype=np.float32).tobytes()
        request = {"ask": "quantise", "type": int(ggml_type), "rows": rows, "columns": columns}
        return self._ask(request, payload)[1]

    def _ask(self, request: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        reply = None
        with suppress(OSError):
            send(self._process.stdin, request, payload)
            reply = receive(self._process.stdout)
        return self._checked(reply)

    def _checked(self, reply: tuple[dict[str, Any], bytes] | None) -> tuple[dict[str, Any], bytes]:
        if reply is None:
            raise TransActError(
                f"llama.cpp crashed while {self._doing} ({_how_it_ended(self._process)}); the file "
                "may be damaged, or the memory may not suffice."
            )
        if "error" in reply[0]:
            raise TransActError(f"llama.cpp failed while {self._doing}: {reply[0]['error']}.")
        return reply


@contextmanager
def running(threads: int | None = None) -> Iterator[LlamaCpp]:
    """A child process with llama.cpp, which ends with the block; `None` threads are the default.

    Raises:
        TransActError: llama.cpp is not installed, or its library cannot be used.
    """
    library = require_llama_cpp()
    threads = threads or default_threads()
    package = Path(llama_cpp_worker.__file__).parents[2]
    search = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", llama_cpp_worker.__name__, str(library), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": search, "GGML_NO_BACKTRACE": "1"},
    )
    try:
        runtime = LlamaCpp(process, threads)
        runtime._checked(receive(process.stdout))
        yield runtime
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()


def _how_it_ended(process: subprocess.Popen) -> str:
    try:
        status = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "it does not answer"
    with suppress(ValueError):
        if status < 0:
            return signal.Signals(-status).name
    return f"exit status {status}"
