"""The gguf package's reader, bounded by the file's end and quick over a vocabulary.

The package's own reader takes seconds for each look at a file with 49,152 tokens, because every
string of an array costs it several views of a mapped file; a conversion looks at a file six times.
"""

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType

from transact_core.base.errors import TransActError

MOST_ITEMS = 10_000_000
"""Largest accepted array of a GGUF file's metadata; vocabularies have some 100,000 items."""


class BoundedReader(GGUFReader):
    """The reader of the gguf package, kept from reading past the end of the file."""

    @property
    def data(self) -> np.ndarray:
        """The bytes of the file, mapped into memory."""
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        # A plain array over the same mapping: a slice of a memmap takes ten times as long.
        self._data = np.asarray(mapped)

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
        self._require(offset, int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, *rest, **named)

    def _require(self, offset: int, size: int) -> None:
        if size < 0 or not 0 <= offset <= int(offset) + size <= len(self.data):
            raise ValueError("something is claimed to lie past the end of the file")

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Bytes, parts, indices of the parts that hold values, and types, of one entry."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        if count[0] > MOST_ITEMS:
            raise ValueError("an array is longer than any vocabulary")
        types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
        start = int(orig_offs) + 12
        if types[1] is GGUFValueType.STRING:
            items, end = self._strings(start, int(count[0]))
        elif (scalar := self.gguf_scalar_to_np.get(types[1])) is not None:
            values = self._get(start, scalar, count[0])
            items = [values[index : index + 1] for index in range(len(values))]
            end = start + values.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        parts = [kind, count, *items]
        return end - orig_offs, parts, list(range(2, len(parts))), types[: 1 + bool(items)]

    def _strings(self, offset: int, count: int) -> tuple[list[np.ndarray], int]:
        """The bytes of so many strings, each after its length, and where the last one ends."""
        read_length = struct.Struct("<Q" if self.endianess is GGUFEndian.LITTLE else ">Q")
        found = []
        for _ in range(count):
            self._require(offset, read_length.size)
            (size,) = read_length.unpack_from(self.data, offset)
            offset += read_length.size
            self._require(offset, size)
            found.append(self.data[offset : offset + size])
            offset += size
        return found, offset


def read_gguf(path: Path) -> GGUFReader:
    """The header of a whole GGUF file, whose tensors lie within it.

    Raises:
        TransActError: the file is no GGUF file, damaged, or one part of a split one.
    """
    try:
        reader = BoundedReader(path)
        parts = reader.fields.get("split.count")
        part_count = 1 if parts is None else int(parts.contents())
    except Exception:
        raise TransActError(f"{path} is truncated, corrupt or not a GGUF file.") from None
    if part_count > 1:
        raise TransActError(
            f"{path} is one of {part_count} parts of a split GGUF file; join them first "
            "(llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf) and name the whole file."
        )
    try:
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except Exception:
        raise TransActError(f"{path} is truncated, corrupt or not a GGUF file.") from None
    if end > path.stat().st_size:
        raise TransActError(f"{path} is truncated: its tensors end past the end of the file.")
    return reader


@contextmanager
def used_by_transformers() -> Iterator[None]:
    """Has transformers read GGUF files with this reader.

    transformers looks the reader up in the gguf package at each call. So does it look up the map of
    tensor names, which it makes anew for each of a model's modules; within this context it is made
    once. Not for several threads at once.
    """
    names = functools.cache(gguf.get_tensor_name_map)
    with mock.patch.multiple(gguf, GGUFReader=BoundedReader, get_tensor_name_map=names):
        yield
