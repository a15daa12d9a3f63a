"""The child process in which llama.cpp runs, so that a crash of the native library ends it alone.

Started by `models.llama_cpp` as `python -m transact_core.models.llama_cpp_worker LIBRARY THREADS`.
A message is a length (4 bytes, little endian), a header of that length in JSON, and as many bytes
as its field `bytes` says: token ids in int32, or numbers in float32. Every request has an answer,
which has a field `error` where the request failed.

The library is llama.cpp's C API (llama.h, ggml.h), called by ctypes. Two structures of parameters
are passed by value and differ between builds. They are taken from the library's own functions for
defaults, as blocks larger than either, and only fields whose defaults have been checked are set.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

PARAMETER_WORDS = 128
"""32-bit words of a block that holds either structure of parameters, whatever the build."""
LOGITS_TOKENS = 512
"""Tokens whose logits are held at a time, llama.cpp's own `n_ubatch`."""
F32, F16, BF16 = 0, 1, 30
"""Numbers of `enum ggml_type` for plain floats."""
FLASH_ATTENTION_OFF = 0
LOG_ERROR = 4
"""The level of errors in `enum ggml_log_level`."""
MOST_REASON = 300
"""Characters of llama.cpp's own words that are passed on."""


class ModelParameters(ctypes.Structure):
    """`struct llama_model_params`, of which nothing is set."""

    _fields_ = (("words", ctypes.c_uint32 * PARAMETER_WORDS),)


class ContextParameters(ctypes.Structure):
    """`struct llama_context_params`, its beginning."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("floats", ctypes.c_float * 6),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint32 * (PARAMETER_WORDS - 28)),
    )


CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "type_k": F16,
    "type_v": F16,
}
"""What these fields must be by default; otherwise the structure is another one."""


class Batch(ctypes.Structure):
    """`struct llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER),
    ),
    "ggml_row_size": (ctypes.c_size_t, (_INT, _LONG)),
    "ggml_validate_row_data": (ctypes.c_bool, (_INT, _POINTER, ctypes.c_size_t)),
    "llama_backend_init": (None, ()),
    "llama_batch_free": (None, (Batch,)),
    "llama_batch_init": (Batch, (_INT, _INT, _INT)),
    "llama_context_default_params": (ContextParameters, ()),
    "llama_decode": (_INT, (_POINTER, Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, _INT)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, ContextParameters)),
    "llama_log_set": (None, (_Log, _POINTER)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_model_default_params": (ModelParameters, ()),
    "llama_model_desc": (_INT, (_POINTER, ctypes.c_char_p, ctypes.c_size_t)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, ModelParameters)),
    "llama_model_n_params": (ctypes.c_uint64, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
}
"""Result and arguments of each function that is called."""


class Refused(Exception):
    """A request that llama.cpp, or this build of it, cannot carry out; in words for the user."""


class Library:
    """llama.cpp's functions, and the errors it has written to its log."""

    def __init__(self, path: str) -> None:
        try:
            self.functions = ctypes.CDLL(path)
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(self.functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise Refused(f"its library cannot be used ({error})") from None
        self.errors: list[str] = []
        self._log = _Log(self._keep_errors)  # held here, as the library calls it later
        self.functions.llama_log_set(self._log, None)
        self.functions.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def _keep_errors(self, level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR and text:
            self.errors.append(text.decode(errors="replace"))

    def context_parameters(self) -> ContextParameters:
        parameters = self.functions.llama_context_default_params()
        for name, expected in CONTEXT_DEFAULTS.items():
            if getattr(parameters, name) != expected:
                raise Refused(f"this build has other context parameters ({name})")
        return parameters

    def reason(self) -> str:
        """Why the last call failed, in llama.cpp's own words."""
        first = self.errors[0] if self.errors else "it gives no reason"
        self.errors.clear()
        words = " ".join(first.rpartition(": error loading model: ")[2].split())
        printable = "".join(letter for letter in words if letter.isprintable())
        return printable[:MOST_REASON].rstrip(".")


class Runtime:
    """One opened model at most, and what may be asked about it."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library, self.threads = library, threads
        self.model = self.context = None
        self.vocab_size = 0

    def open(self, path: str, context_length: int, exact: bool) -> dict[str, Any]:
        """Loads a model. `exact` computes attention as transformers does: in float32, unfused."""
        library = self.library
        library.errors.clear()
        started = time.perf_counter()
        self.model = library.llama_model_load_from_file(
            os.fsencode(path), library.llama_model_default_params()
        )
        if not self.model:
            raise Refused(library.reason())
        parameters = library.context_parameters()
        parameters.n_ctx = context_length
        parameters.n_threads = parameters.n_threads_batch = self.threads
        if exact:
            parameters.flash_attn_type = FLASH_ATTENTION_OFF
            parameters.type_k = parameters.type_v = F32
        self.context = library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise Refused(library.reason())
        seconds = time.perf_counter() - started
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        words = ctypes.create_string_buffer(128)
        library.llama_model_desc(self.model, words, len(words))
        return {
            "seconds": seconds,
            "vocab_size": self.vocab_size,
            "parameters": library.llama_model_n_params(self.model),
            "description": words.value.decode(errors="replace"),
        }

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of every token of one window, shape (tokens, vocabulary), float32."""
        return np.concatenate([piece for _, piece in self._pieces(ids)])

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats of each token after the first, float32."""
        found = []
        for start, logits in self._pieces(ids):
            targets = ids[start + 1 : start + 1 + len(logits)]
            logits = logits[: len(targets)]
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(targets)), targets]
            found.append(np.log(np.exp(logits, out=logits).sum(axis=1)) - chosen)
        return np.concatenate(found)

    def feed(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits after the last token, of tokens that go on from `position` earlier ones."""
        if position == 0:
            self._clear()
        self._decode(ids, position, every=False)
        last = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(last, (self.vocab_size,)).copy()

    def time(self, ids: np.ndarray, new_tokens: int) -> dict[str, float]:
        """Seconds of a prompt, and seconds for each token that is decoded greedily after it."""
        self._clear()
        clock = [time.perf_counter()]
        self._decode(ids, 0, every=False)
        following = self._likeliest()
        clock.append(time.perf_counter())
        for position in range(len(ids), len(ids) + new_tokens):
            self._decode(np.array([following], dtype=np.int32), position, every=False)
            following = self._likeliest()
        clock.append(time.perf_counter())
        return {"prefill": clock[1] - clock[0], "decode": (clock[2] - clock[1]) / new_tokens}

    def quantise(self, weights: np.ndarray, importance: np.ndarray | None, type: int) -> bytes:
        """Rows of float32 weights in another type; `importance` has a value for each column."""
        library = self.library
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        rows, columns = weights.shape
        stored = np.empty(rows * library.ggml_row_size(type, columns), dtype=np.uint8)
        columns_of = None if importance is None else importance.ctypes.data
        at_once = -(-rows // self.threads)

        def write(first: int) -> int:
            return library.ggml_quantize_chunk(
                type,
                weights.ctypes.data,
                stored.ctypes.data,
                first * columns,
                min(at_once, rows - first),
                columns,
                columns_of,
            )

        # Rows are independent of each other; ctypes lets other threads run meanwhile.
        with ThreadPoolExecutor(self.threads) as threads:
            whole = sum(threads.map(write, range(0, rows, at_once))) == len(stored)
        if not whole or not library.ggml_validate_row_data(type, stored.ctypes.data, len(stored)):
            raise Refused("the weights are not finite in that type")
        return stored.tobytes()

    def _pieces(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Pieces of one window, each as (index of its first token, logits of its tokens)."""
        self._clear()
        for start in range(0, len(ids), LOGITS_TOKENS):
            piece = ids[start : start + LOGITS_TOKENS]
            self._decode(piece, start, every=True)
            first = self.library.llama_get_logits_ith(self.context, 0)
            yield start, np.ctypeslib.as_array(first, (len(piece), self.vocab_size)).copy()

    def _clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def _likeliest(self) -> int:
        last = self.library.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(last, (self.vocab_size,)).argmax())

    def _decode(self, ids: np.ndarray, position: int, every: bool) -> None:
        """Feeds tokens; `every` keeps the logits of all of them, else those of the last."""
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise Refused(f"a token is none of the {self.vocab_size:,} of its vocabulary")
        batch_tokens = CONTEXT_DEFAULTS["n_batch"]
        for start in range(0, len(ids), batch_tokens):
            piece = ids[start : start + batch_tokens]
            batch = self.library.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for index, token in enumerate(piece.tolist()):
                batch.token[index] = token
                batch.pos[index] = position + start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = every or start + index == len(ids) - 1
            status = self.library.llama_decode(self.context, batch)
            self.library.llama_batch_free(batch)
            if status:
                raise Refused(f"it does not compute the text ({self.library.reason()})")


def peak_bytes() -> int | None:
    """The most memory that this process has held, in bytes; None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Bytes on macOS, where this is reached.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- messages --------------------------------------------------------------------------------


def send(stream: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    """Writes one message."""
    words = json.dumps(header | {"bytes": len(payload)}).encode()
    stream.write(len(words).to_bytes(4, "little") + words)
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Reads one message; None where the other side is gone."""
    length = stream.read(4)
    if len(length) < 4:
        return None
    words = stream.read(int.from_bytes(length, "little"))
    try:
        header = json.loads(words)
    except ValueError:
        return None
    payload = stream.read(header.pop("bytes"))
    return header, payload


def answer(runtime: Runtime, header: dict[str, Any], payload: bytes) -> tuple[dict, bytes]:
    """Carries out one request."""
    asked = header["ask"]
    if asked == "open":
        return runtime.open(header["path"], header["context_length"], header["exact"]), b""
    if asked == "memory":
        return {"peak_bytes": peak_bytes()}, b""
    if asked == "quantise":
        numbers = np.frombuffer(payload, dtype=np.float32)
        count = header["rows"] * header["columns"]
        weights = numbers[:count].reshape(header["rows"], header["columns"])
        importance = numbers[count:] if len(numbers) > count else None
        return {}, runtime.quantise(weights, importance, header["type"])
    ids = np.frombuffer(payload, dtype=np.int32)
    if asked == "time":
        return runtime.time(ids, header["new_tokens"]), b""
    if asked == "feed":
        return {}, runtime.feed(ids, header["position"]).tobytes()
    return {}, {"losses": runtime.losses, "logits": runtime.logits}[asked](ids).tobytes()


def _without_core_dump() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    # What the library prints must not get among the messages.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _without_core_dump()
    try:
        runtime = Runtime(Library(path), threads)
        runtime.library.context_parameters()
    except Refused as refusal:
        send(replies, {"error": str(refusal)})
        return
    send(replies, {})
    while (request := receive(sys.stdin.buffer)) is not None:
        try:
            header, payload = answer(runtime, *request)
        except Refused as refusal:
            header, payload = {"error": str(refusal)}, b""
        except MemoryError:
            header, payload = {"error": "the memory does not suffice"}, b""
        send(replies, header, payload)


if __name__ == "__main__":
    main()
