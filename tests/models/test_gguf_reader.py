"""The quick reader finds what the gguf package's own reader finds."""

import gguf
import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter

from transact_core.base.errors import TransActError
from transact_core.models.gguf_reader import BoundedReader, read_gguf, used_by_transformers


def write(path, endianess=GGUFEndian.LITTLE):
    writer = GGUFWriter(path, "llama", endianess=endianess)
    writer.add_array("words", ["", "a", "grün", "x" * 300])
    writer.add_array("no_words", [])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("numbers", [3, -70_000])
    writer.add_array("flags", [True, False])
    writer.add_array("lists", [[1, 2], [3, 4]])
    writer.add_float64("exact", 0.1)
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endianess", list(GGUFEndian))
def test_fields_and_tensors_are_those_of_the_packages_reader(tmp_path, endianess):
    path = write(tmp_path / "small.gguf", endianess)
    mine, stock = BoundedReader(path), GGUFReader(path)
    assert list(mine.fields) == list(stock.fields)
    for name, field in stock.fields.items():
        assert mine.fields[name].contents() == field.contents(), name
        assert mine.fields[name].types == field.types
        assert mine.fields[name].offset == field.offset
    for tensor, expected in zip(mine.tensors, stock.tensors, strict=True):
        assert (tensor.name, tensor.data_offset) == (expected.name, expected.data_offset)
        np.testing.assert_array_equal(tensor.data, expected.data)


def test_a_file_that_ends_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(TransActError, match="is truncated"):
            read_gguf(cut)


def test_transformers_reads_with_it_and_only_within_the_context():
    stock = gguf.GGUFReader, gguf.get_tensor_name_map
    with used_by_transformers():
        assert gguf.GGUFReader is BoundedReader
        kind = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(kind, 2) is gguf.get_tensor_name_map(kind, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == stock
