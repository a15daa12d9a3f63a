"""Settings of the C library's memory allocator."""

import ctypes
import sys

LARGE_BYTES = 1 << 24
"""Smallest allocation, in bytes, that is returned to the system when it is freed (16 MiB). The many
short-lived allocations of a model as small as the built-in one are smaller, and reusing them is
faster."""
M_MMAP_THRESHOLD = -3
"""The parameter's number for mallopt(3)."""


def give_large_blocks_back() -> None:
    """Makes the GNU C library return large allocations to the system as soon as they are freed.

    By default it keeps freed allocations of up to 32 MiB for reuse. After the work on one layer of
    a large model these are hundreds of megabytes, in pieces that do not fit the next layer's
    allocations. With other C libraries this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
