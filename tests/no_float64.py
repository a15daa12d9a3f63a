"""Devices that need no such hardware: one without float64, as Apple's GPUs are, or several GPUs.

`elsewhere(tensor)` is a tensor on such a device. It computes on the CPU, but torch sees the device
type "meta", and what a real device refuses raises: float64 on it where it has none, an operation
between tensors on two of them, and one between it and a CPU tensor, but for indices and single
numbers. `simulated()` must be active, for factories such as `torch.zeros(..., device=...)`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from transact_core.experiments.bench import Bench
from transact_core.importance.scores import IMPORTANCES

DEVICE = torch.device("meta")
"""What code sees as the device of such a tensor where there is one such device."""
SEVERAL = tuple(torch.device("meta", index) for index in range(2))
"""And where there are two."""
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
"""Operations of aten that take indices from the CPU for tensors on any device."""
COPIES = ("to", "_to_copy", "copy_")
"""Operations of aten that go from one device to another."""


READINGS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")
"""Operations of aten whose results the CPU has to know."""
waits: Counter[str] = Counter()
"""How often the CPU had to wait for a simulated device, by the operation that made it wait: one of
`READINGS`, or a copy to the CPU."""


class Elsewhere(torch.Tensor):
    """A tensor on the simulated device; `inner` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = DEVICE) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: torch.Tensor, device: torch.device = DEVICE) -> None:
        if inner.dtype == torch.float64 and not _has_float64:
            raise TypeError("the device has no float64")
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            # It chooses a kernel by the device before operations are dispatched.
            return _attend(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            # torch would put the indices on the meta device, where they lose their values.
            args = (args[0], torch.as_tensor(args[1], device="cpu"))
        if func is torch.Tensor.new_tensor:
            # It does not pass through the dispatcher.
            made = args[0].inner.new_tensor(*args[1:], **(kwargs or {}))
            return Elsewhere(made, args[0].device)
        # The default would make subclasses of what came back to the CPU.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention in plain operations, so that autograd sees them."""
    assert not dropout_p
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    logits = query @ key.mT * scale
    if is_causal:
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        logits = logits.masked_fill(later.triu(1), -torch.inf)
    if attn_mask is not None:
        says_which = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if says_which else logits + attn_mask
    return logits.softmax(dim=-1) @ value


def _inner(value: object) -> object:
    """What stands for the value, or for those in a list, on the CPU."""
    if isinstance(value, Elsewhere):
        return value.inner
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value


def _outer(result: object, device: torch.device) -> object:
    """A result on the CPU, or those in a list, on a simulated device."""
    if isinstance(result, torch.Tensor):
        return Elsewhere(result, device)
    if type(result) in (list, tuple):
        return type(result)(_outer(each, device) for each in result)
    return result


def _flat(values: Iterable[object]) -> Iterator[object]:
    """Arguments of an operation; torch's own trees are slower, and operations only have lists."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def elsewhere(tensor: torch.Tensor, device: torch.device = DEVICE) -> Elsewhere:
    return Elsewhere(tensor.detach().clone(), device)


def move(model: nn.Module, device: torch.device = DEVICE) -> nn.Module:
    """Puts a model's weights and buffers on a simulated device, tied ones once; those that are on
    one stay there."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not isinstance(weight, Elsewhere):
                if id(weight) not in moved:
                    there = elsewhere(weight, device)
                    moved[id(weight)] = nn.Parameter(there, requires_grad=False)
                module._parameters[name] = moved[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, Elsewhere):
                module._buffers[name] = elsewhere(buffer, device)
    return model


def _dispatched(func, args: tuple, kwargs: dict) -> object:
    name = func.overloadpacket.__name__
    values = list(_flat((*args, *kwargs.values())))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    devices = [value for value in values if isinstance(value, torch.device)]
    here = there[0].device if there else None
    lands_on = here if not devices else devices[0] if devices[0].type == DEVICE.type else None
    if name == "copy_":
        lands_on = args[0].device if isinstance(args[0], Elsewhere) else None
    if not there and lands_on is None:
        return func(*args, **kwargs)
    if there and (name in READINGS or lands_on is None):
        waits[name] += 1
    if name not in COPIES:
        strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
        if there and strangers and name not in INDEXING:
            raise RuntimeError(f"{name} of tensors on two devices")
        if any(tensor.device != here for tensor in there):
            raise RuntimeError(f"{name} of tensors on two devices")
    if lands_on is not None and kwargs.get("dtype") == torch.float64 and not _has_float64:
        raise TypeError(f"{name} makes float64, which the device lacks")
    result = func(*map(_inner, args), **{option: _inner(value) for option, value in kwargs.items()})
    if lands_on is None:
        return result
    wrapped = _outer(result, lands_on)
    # What went to another device has no memory in common with where it came from.
    alone = not there or (name in ("to", "_to_copy") and lands_on != here)
    return wrapped if alone else return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


_has_float64 = False
"""Whether the devices that are simulated now have float64."""


@contextmanager
def simulated(has_float64: bool = False) -> Iterator[None]:
    """While it is active, a simulated device can be asked for, or several."""
    make_tensor = torch.tensor

    def tensor(values: object, **options: object) -> torch.Tensor:
        device = options.pop("device", None) or torch.empty(0).device
        return make_tensor(values, device="cpu", **options).to(device)

    class Generator(torch.Generator):
        def __new__(cls, device: object = "cpu") -> torch.Generator:
            return super().__new__(cls, "cpu")

    with torch.device("cpu"):
        # torch remembers at first use which functions follow such a context; not the patched one.
        torch.empty(0)
    # These two do not pass through the dispatcher.
    with (
        _Mode(),
        patch("torch.tensor", tensor),
        patch("torch.Generator", Generator),
        patch(f"{__name__}._has_float64", has_float64),
    ):
        if not has_float64:
            yield
            return
        with ExitStack() as stack:
            for module in ("base.linalg", "planning.damage"):
                name = f"transact_core.{module}.FLOAT64_DEVICES"
                stack.enter_context(patch(name, ("cpu", DEVICE.type)))
            yield


def measured_alike(
    ours: Bench, on_cpu: Bench, close: Callable[[torch.Tensor, torch.Tensor], None]
) -> None:
    """Asserts that statistics and all importances are those of the CPU, as `close` compares."""
    for name, sums in ours.statistics().to_tensors().items():
        close(sums, on_cpu.statistics().to_tensors()[name])
    for importance in IMPORTANCES:
        found, expected = (bench.scores(importance) for bench in (ours, on_cpu))
        for unit in ("heads", "head_channels", "channels"):
            close(getattr(found, unit), getattr(expected, unit))
