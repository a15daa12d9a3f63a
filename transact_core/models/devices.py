"""Where a model computes and in which dtype, and whether its weights fit there."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise TransActError(
            f"The device {name!r} is not to be had here; use cpu or auto."
        ) from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "float16", "bfloat16"):
        raise TransActError(f"The dtype {name!r} is none of float32, float16, bfloat16, auto.")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """As a configuration has it: `float16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that loading takes at its peak against bytes that are free, on one device."""

    needed: int
    available: int
    device: str

    @property
    def sentence(self) -> str:
        return (
            f"Loading takes about {self.needed / 1e9:.1f} GB of memory on {self.device}, "
            f"where {self.available / 1e9:.1f} GB are free"
        )

    def verdict(self) -> str | None:
        """A warning where it is tight, None where it is not.

        Raises:
            TransActError: it does not fit.
        """
        if self.needed > self.available:
            raise TransActError(
                f"{self.sentence}; free some memory, choose a 16-bit dtype or a smaller model."
            )
        if 2 * self.needed > self.available:
            return f"{self.sentence}: a pruned model beside the dense one may not fit."
        return None


def estimate_memory(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, gguf: bool = False
) -> MemoryEstimate:
    """Peak of loading: the weights, and for a GGUF file their float32 form on the way."""
    needed = architecture.parameters * dtype.itemsize
    if gguf:
        needed = architecture.parameters * (4 + dtype.itemsize)
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    return MemoryEstimate(needed=needed, available=available, device=str(device))


def available_memory() -> int:
    """Free memory in bytes, the control group's limit respected where one is set."""
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        available = min(available, limit - used)
    return available
