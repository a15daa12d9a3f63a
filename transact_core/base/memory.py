"""Memory of the process, where Python and torch leave it to the C library."""

import ctypes
import sys

LARGE_BYTES = 1 << 24
"""Of an allocation; what models as small as the built-in one allocate in a hurry stays below it."""
M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""


def give_large_blocks_back() -> None:
    """Has the GNU C library return large allocations to the system as soon as they are freed.

    By itself it keeps those of up to 32 MiB for later; after work on one layer of a large model
    that is hundreds of megabytes, in pieces which the work on the next one does not fit. Does
    nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
