"""Devices, dtypes, and whether a model's weights fit into the memory."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture


def resolve_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        TransActError: the device is unknown or not present.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise TransActError(
            f"The device {name!r} is not available here; use cpu or auto."
        ) from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        TransActError: the name is none of float32, float16, bfloat16 and auto.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "float16", "bfloat16"):
        raise TransActError(f"The dtype {name!r} is none of float32, float16, bfloat16, auto.")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configurations use, such as `float16`."""
    return str(dtype).removeprefix("torch.")


CGROUP_FOLDER = Path("/sys/fs/cgroup")
CONTROL_GROUPS = (
    (CGROUP_FOLDER, "memory.max", "memory.current"),
    (CGROUP_FOLDER / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Folder and the files of limit and usage, for cgroup 2 and cgroup 1 as containers see them."""
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Fields of a control group's `memory.stat` that the kernel frees before it refuses memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that loading takes at its peak, and bytes that are free, on one device."""

    needed: int
    available: int
    device: str
    """Name of the device, for messages."""

    @property
    def sentence(self) -> str:
        return (
            f"Loading takes about {self.needed / 1e9:.1f} GB of memory on {self.device}, "
            f"where {self.available / 1e9:.1f} GB are free"
        )

    @property
    def fits(self) -> bool:
        """Whether as much is free as is needed."""
        return self.needed <= self.available

    def verdict(self) -> str | None:
        """A warning where a second model would not fit beside the first, None otherwise.

        Raises:
            TransActError: the model itself does not fit.
        """
        if not self.fits:
            raise TransActError(
                f"{self.sentence}; free some memory, choose a 16-bit dtype or a smaller model."
            )
        if 2 * self.needed > self.available:
            return f"{self.sentence}: a pruned model beside the dense one may not fit."
        return None


def estimate_memory(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, gguf: bool = False
) -> MemoryEstimate:
    """Peak memory of loading: the weights, and with `gguf` also their float32 form."""
    needed = architecture.parameters * dtype.itemsize
    if gguf:
        needed = architecture.parameters * (4 + dtype.itemsize)
    return MemoryEstimate(needed=needed, available=free_memory(device), device=str(device))


def estimate_offloaded(
    architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> MemoryEstimate:
    """Peak memory of the weights where decoder layers are read from disk: all that is outside of
    them, the layer that is worked on, and the next one."""
    largest = max(map(architecture.layer_parameters, range(architecture.num_hidden_layers)))
    outside = sum(math.prod(shape) for shape in architecture.outer_tensors().values())
    needed = (outside + 2 * largest) * dtype.itemsize
    return MemoryEstimate(needed=needed, available=free_memory(device), device=str(device))


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def available_memory() -> int:
    """Free memory in bytes, at most what the limit of the control group leaves (cgroup 2 and 1)."""
    available = psutil.virtual_memory().available
    for group, limit, usage in CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            used = int((group / usage).read_text()) - _reclaimable(group)
            available = min(available, int((group / limit).read_text()) - used)
    return max(available, 0)


def _reclaimable(group: Path) -> int:
    """Bytes that count as used by a control group and that the kernel gives back on demand.

    Files that were read stay in the page cache, which is most of the usage after loading a model.
    """
    stored: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, value = line.split()
            stored[name] = int(value)
    # Version 1 counts the groups below it only in the fields that begin with `total_`.
    return sum(stored.get(f"total_{name}", stored.get(name, 0)) for name in RECLAIMABLE)
