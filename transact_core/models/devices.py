"""Devices, dtypes, and whether a model's weights fit into the memory."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from transact_core.base.errors import TransActError
from transact_core.models.architecture import Architecture


def resolve_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is the first GPU, or the CPU where there is none. Of several
    names it is the first one.

    Raises:
        TransActError: as `resolve_devices`.
    """
    return resolve_devices(name)[0]


def resolve_devices(name: str = "auto") -> tuple[torch.device, ...]:
    """The devices over which a model's layers may be laid: those that are named, with commas
    between them, or all GPUs for `auto` and `cuda`; the CPU for `auto` where there is no GPU.

    Raises:
        TransActError: a device is unknown or not present, or several are named that are not
            different GPUs.
    """
    if "," in name:
        devices = tuple(_present(each.strip()) for each in name.split(","))
        if len(set(devices)) < len(devices) or any(device.index is None for device in devices):
            raise TransActError(
                f"The devices {name!r} are not different GPUs; name them as cuda:0,cuda:1."
            )
        return devices
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = _present(name)
    if name != "cuda" or torch.cuda.device_count() < 2:
        return (device,)
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def _present(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise TransActError(
            f"The device {name!r} is not available here; use cpu or auto."
        ) from None
    return device


def hardware(devices: Sequence[torch.device]) -> str:
    """What of these devices the last bits of a result depend on, for the keys of kept results.

    That is the type of a device, and of GPUs their model and the version of CUDA. It stays the same
    where layers are laid over several GPUs of one model.
    """
    kinds = [
        f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
        if device.type == "cuda"
        else device.type
        for device in devices
    ]
    return " and ".join(dict.fromkeys(kinds))


def require_same_bits(device: torch.device) -> None:
    """On a GPU, has torch use algorithms that give the same bits each time, where it has them.

    For the whole process, and before its first product on the GPU: cuBLAS reads the size of its
    workspace then. An operation without such an algorithm warns and goes on. On a CPU nothing is
    set: there the same number of threads gives the same bits.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # All that is read was written before, so this would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False


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


TENSORS_ON_THE_WAY = 4
"""Tensors that transformers reads at a time, each by a thread."""


def estimate_host(architecture: Architecture, stored: torch.dtype, gguf: bool) -> MemoryEstimate:
    """Peak memory of the CPU while weights of the dtype `stored` are read straight to a GPU: the
    tensors on their way, or with `gguf` the whole model while it is converted."""
    if gguf:
        needed = architecture.parameters * (4 + stored.itemsize)
    else:
        layers = range(1 if architecture.uniform else architecture.num_hidden_layers)
        tensors = [architecture.outer_tensors(), *map(architecture.layer_tensors, layers)]
        largest = max(math.prod(shape) for each in tensors for shape in each.values())
        needed = TENSORS_ON_THE_WAY * largest * stored.itemsize
    return MemoryEstimate(needed=needed, available=available_memory(), device="cpu")


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
        # What this process was given and does not use is free for it alone.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
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
