"""Files hold the bytes that llama.cpp's own quantiser writes.

The digests were recorded with an independent build of llama.cpp (`stock_quantiser.py`), which is
asked once more where it is installed.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.trust.installed import require_llama_cpp_installed
from tests.trust.stock_quantiser import (
    LAYERS,
    STORED,
    by_stock,
    cases,
    digest_of_bytes,
    digest_of_types,
    key,
    planned,
    write,
)

require_llama_cpp_installed()

RECORDED = json.loads(STORED.read_text())


def test_every_case_is_recorded():
    for what in LAYERS:
        assert RECORDED[what].keys() == {key(*case) for case in cases()}


@pytest.mark.parametrize("case", cases(), ids=lambda case: key(*case))
def test_tensors_get_the_stock_types(case):
    size, chosen, weighted = case
    plan = planned(size, LAYERS["types"], chosen, weighted)
    types = {tensor.name: tensor.kind.name for tensor in plan.tensors}
    assert digest_of_types(types) == RECORDED["types"][key(*case)]


# Of the first size in every type; of the others in those that most people take.
WRITTEN = [
    (size, chosen, weighted)
    for size, chosen, weighted in cases()
    if size == "untied" or (weighted and chosen in ("Q8_0", "Q4_K_M", "Q4_0"))
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: key(*case))
def test_bytes_are_the_stock_ones(case, tmp_path):
    size, chosen, weighted = case
    plan = write(tmp_path / "x.gguf", size, LAYERS["bytes"], chosen, weighted)
    assert (tmp_path / "x.gguf").stat().st_size == plan.bytes
    assert digest_of_bytes(tmp_path / "x.gguf") == RECORDED["bytes"][key(*case)]


def test_the_record_is_what_the_stock_quantiser_writes(tmp_path):
    folder = Path(os.environ.get("STOCK_LLAMA_CPP") or Path(sys.prefix) / "stock-llama-cpp")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; `make stock-llama-cpp` fetches it")
    assert by_stock(tmp_path) == RECORDED
