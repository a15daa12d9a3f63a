"""What llama.cpp's own quantiser, `llama_model_quantize`, makes of GGUF files.

A request has the files to read and to write, the number of the type (`enum llama_ftype`), and the
importance matrix as lists by tensor, or none. The library is an independent build of llama.cpp,
in the folder that the environment variable `STOCK_LLAMA_CPP` names.
"""

import ctypes
import os
from pathlib import Path

import numpy as np
from answering import run

POINTER_AT = 24
"""Byte of the pointer to the importance matrix in `struct llama_model_quantize_params`."""


class Parameters(ctypes.Structure):
    """Its beginning, in a block that is larger than the whole structure."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        ("flags", ctypes.c_uint8 * 8),
        ("imatrix", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * 480),
    )


class ImatrixEntry(ctypes.Structure):
    """`struct llama_model_imatrix_data`; an array of them ends with one without a name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def library() -> ctypes.CDLL:
    folder = Path(os.environ["STOCK_LLAMA_CPP"])
    for name in ("libggml-base.so", "libggml.v*.so"):
        ctypes.CDLL(str(next(folder.glob(name))), mode=ctypes.RTLD_GLOBAL)
    opened = ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))))
    opened.llama_model_quantize_default_params.restype = Parameters
    opened.llama_model_quantize.argtypes = (
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.POINTER(Parameters),
    )
    opened.llama_model_quantize.restype = ctypes.c_uint32
    return opened


def answer(read: str, write: str, file_type: int, imatrix: dict[str, list[float]] | None) -> dict:
    stock = library()
    parameters = stock.llama_model_quantize_default_params()
    assert Parameters.imatrix.offset == POINTER_AT
    assert parameters.imatrix is None
    # Its flags are: requantise, quantise the LM head, only copy, pure, keep split, dry run.
    assert list(parameters.flags)[:6] == [0, 1, 0, 0, 0, 0]
    parameters.nthread, parameters.ftype = 1, file_type
    held = [np.array(values, dtype=np.float32) for values in (imatrix or {}).values()]
    if imatrix:
        entries = (ImatrixEntry * (len(imatrix) + 1))(
            *(
                ImatrixEntry(name.encode(), values.ctypes.data, len(values))
                for name, values in zip(imatrix, held, strict=True)
            )
        )
        parameters.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    status = stock.llama_model_quantize(read.encode(), write.encode(), ctypes.byref(parameters))
    return {"status": status}


if __name__ == "__main__":
    run(answer)
