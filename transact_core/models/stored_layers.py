"""Decoder layers whose weights lie on disk and are read one layer at a time.

Passes over a model work on one layer at a time, so the others need not be in memory: a layer's
weights are read when it is borrowed and let go of when it is given back. While it is worked on, the
next one is read by a thread. So at most two layers have weights at the same time, and each pass
over the layers reads all of them once.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from transact_core.base.errors import TransActError

Places = Mapping[str, tuple[Path, str]]
"""Of each of a layer's parameters the safetensors file that it is in, and its name there."""

WHY_NOT_WHOLE = (
    "the layers of this model are read from disk one at a time, as the model does not fit into the "
    "free memory or as --offload asks for it; choose a smaller model, a 16-bit dtype or a machine "
    "with more memory"
)
"""Why something cannot be done, as a clause."""


class StoredLayers(nn.ModuleList):
    """The decoder layers of a model, with weights only where and while they are borrowed.

    At all other times a layer's parameters are on torch's meta device: they have a shape and no
    values.
    """

    def __init__(
        self,
        empty: Sequence[nn.Module],
        places: Sequence[Places],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            empty: The layers, on the meta device.
            places: Where the weights of each layer are.
            dtype: What the weights are converted to.
            device: Where they are put.
        """
        super().__init__(empty)
        self._places, self._dtype, self._device = places, dtype, device
        self._empty = [dict(layer.named_parameters()) for layer in empty]
        self._borrowers: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layers")
        self._ahead: tuple[int, Future] | None = None
        """The layer that is read before it is asked for."""
        self._last = 0
        """The layer that was read last."""
        for layer in empty:
            layer.register_forward_pre_hook(_require_weights)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or some of them as a plain list of modules."""
        layers = [*self][index]
        return nn.ModuleList(layers) if isinstance(index, slice) else layers

    @contextmanager
    def borrow(self, layer_index: int) -> Iterator[nn.Module]:
        """The decoder layer of that index, counted from 0, with its weights.

        Raises:
            TransActError: its file cannot be read any more.
        """
        layer = self[layer_index]
        with self._lock:
            if not self._borrowers[layer_index]:
                give_weights(layer, self._weights(layer_index))
            self._borrowers[layer_index] += 1
        try:
            yield layer
        finally:
            with self._lock:
                self._borrowers[layer_index] -= 1
                if not self._borrowers[layer_index]:
                    give_weights(layer, self._empty[layer_index])

    def _weights(self, layer_index: int) -> dict[str, nn.Parameter]:
        """The weights of a layer; begins to read the one that a pass in the same direction takes
        next."""
        coming = layer_index + (-1 if layer_index == self._last - 1 else 1)
        self._last = layer_index
        if self._ahead and self._ahead[0] == layer_index:
            (_, reading), self._ahead = self._ahead, None
            weights = reading.result()
        else:
            if self._ahead and self._ahead[0] != coming:
                self._drop_ahead()
            weights = self._read(layer_index)
        if self._ahead is None and 0 <= coming < len(self):
            self._ahead = coming, self._reader.submit(self._read, coming)
        return weights

    def _drop_ahead(self) -> None:
        """Lets go of a layer that was read and not asked for."""
        (_, reading), self._ahead = self._ahead, None
        if not reading.cancel():
            reading.exception()  # waits, so that no third layer is in memory

    def _read(self, layer_index: int) -> dict[str, nn.Parameter]:
        places = self._places[layer_index]
        try:
            return read_weights(places, self._dtype, self._device)
        except (OSError, SafetensorError) as error:
            file, _ = next(iter(places.values()))
            raise TransActError(
                f"Layer {layer_index} cannot be read from {file.parent} any more ({error})."
            ) from None


def read_weights(
    places: Places, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Parameter]:
    """The weights of a layer, each put on the device as it is read.

    Raises:
        OSError, SafetensorError: a file cannot be read.
    """
    # Copies: a view of the file would be read again wherever its pages were given up meanwhile. A
    # pass without gradients may run inside one with them, so no tensor of inference mode.
    weights = {}
    with torch.inference_mode(False), ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in {file for file, _ in places.values()}
        }
        for name, (file, stored) in places.items():
            copied = files[file].get_tensor(stored).to(device, dtype, copy=True)
            weights[name] = nn.Parameter(copied, requires_grad=False)
    return weights


def give_weights(layer: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Gives a layer these parameters in place of its own."""
    for name, weight in weights.items():
        place, _, own_name = name.rpartition(".")
        setattr(layer.get_submodule(place), own_name, weight)


def _require_weights(layer: nn.Module, _: tuple) -> None:
    if next(layer.parameters()).is_meta:
        raise TransActError(f"This needs the whole model in memory, and {WHY_NOT_WHOLE}.")
