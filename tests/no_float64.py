"""A device without float64 that needs no such hardware, as Apple's GPUs are.

`elsewhere(tensor)` is a tensor on that device. It computes on the CPU, but torch sees the device
type "meta", and what a real device refuses raises: float64 on it, and an operation between it and a
CPU tensor, but for indices and single numbers. `simulated()` must be active, for factories such as
`torch.zeros(..., device=...)`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
"""What code sees as the device of such a tensor."""
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
"""Operations of aten that take indices from the CPU for tensors on any device."""
COPIES = ("to", "_to_copy", "copy_")
"""Operations of aten that go from one device to another."""


class Elsewhere(torch.Tensor):
    """A tensor on the simulated device; `inner` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        if inner.dtype == torch.float64:
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
            return Elsewhere(args[0].inner.new_tensor(*args[1:], **(kwargs or {})))
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
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Causal attention in plain operations, so that autograd sees them."""
    assert is_causal
    assert attn_mask is None
    assert not dropout_p
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE).triu(1)
    logits = (query @ key.mT * scale).masked_fill(later, -torch.inf)
    return logits.softmax(dim=-1) @ value


def _inner(value: object) -> object:
    """What stands for the value, or for those in a list, on the CPU."""
    if isinstance(value, Elsewhere):
        return value.inner
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value


def _outer(result: object) -> object:
    """A result on the CPU, or those in a list, on the simulated device."""
    if isinstance(result, torch.Tensor):
        return Elsewhere(result)
    return type(result)(map(_outer, result)) if type(result) in (list, tuple) else result


def _flat(values: Iterable[object]) -> Iterator[object]:
    """Arguments of an operation; torch's own trees are slower, and operations only have lists."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def elsewhere(tensor: torch.Tensor) -> Elsewhere:
    return Elsewhere(tensor.detach().clone())


def move(model: nn.Module) -> nn.Module:
    """Puts a model's weights and buffers on the simulated device, tied ones once."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in moved:
                    moved[id(weight)] = nn.Parameter(elsewhere(weight), requires_grad=False)
                module._parameters[name] = moved[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = elsewhere(buffer)
    return model


def _dispatched(func, args: tuple, kwargs: dict) -> object:
    name = func.overloadpacket.__name__
    values = list(_flat((*args, *kwargs.values())))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    devices = [value for value in values if isinstance(value, torch.device)]
    lands_there = devices[0] == DEVICE if devices else bool(there)
    if name == "copy_":
        lands_there = isinstance(args[0], Elsewhere)
    if not there and not lands_there:
        return func(*args, **kwargs)
    if name not in COPIES and name not in INDEXING:
        strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
        if there and strangers:
            raise RuntimeError(f"{name} of tensors on two devices")
    if lands_there and kwargs.get("dtype") == torch.float64:
        raise TypeError(f"{name} makes float64, which the device lacks")
    result = func(*map(_inner, args), **{option: _inner(value) for option, value in kwargs.items()})
    if not lands_there:
        return result
    wrapped = _outer(result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


@contextmanager
def simulated() -> Iterator[None]:
    """While it is active, the simulated device can be asked for."""
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
    with _Mode(), patch("torch.tensor", tensor), patch("torch.Generator", Generator):
        yield
