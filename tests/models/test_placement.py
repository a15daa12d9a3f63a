"""Layers laid over several devices, weights that go straight to a device, and what is asked before.

No GPU is needed: names of devices stand for GPUs where only their memory is asked for, and where
weights are read, each name is one of the CPU. `tests/trust/test_several_devices.py` computes on
devices that refuse each other's tensors.
"""

import os
from itertools import combinations_with_replacement, pairwise
from math import prod
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import KINDS, make_model, same_weights, snapshot
from transact_core.base.errors import TransActError
from transact_core.models import devices, placement
from transact_core.models import load as models
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import read_checkpoint, spread_checkpoint
from transact_core.models.devices import (
    TENSORS_ON_THE_WAY,
    estimate_host,
    hardware,
    require_same_bits,
    resolve_devices,
)
from transact_core.models.load import load_model
from transact_core.models.placement import lay_out
from transact_core.models.stock_class import StockModel

GPUS = tuple(torch.device("cuda", index) for index in range(3))
CPUS = tuple(torch.device("cpu", index) for index in range(2))


def sized(outer, layers):
    """Stands for an architecture with so many bytes outside of its layers and in each of them."""
    return SimpleNamespace(
        num_hidden_layers=len(layers),
        layer_parameters=lambda index: layers[index],
        outer_tensors=lambda: {"all": (outer,)},
    )


@given(
    st.integers(0, 30),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.lists(st.integers(1, 50), min_size=2, max_size=3),
)
def test_no_other_split_leaves_more_room_on_the_fullest_device(outer, layers, free):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placement, "free_memory", lambda device: free[device.index])
        estimate, found = lay_out(sized(outer, layers), torch.int8, GPUS[: len(free)])

    def share(edges):
        """How full the fullest device is where a new device begins at these layers."""
        ends = [0, *edges, len(layers)]
        taken = [sum(layers[start:end]) for start, end in pairwise(ends)]
        taken[0] += outer
        return max(used / room for used, room in zip(taken, free, strict=True))

    places = range(len(layers) + 1)
    splits = combinations_with_replacement(places, len(free) - 1)
    best = min(map(share, splits))
    assert estimate.needed == outer + sum(layers)
    assert estimate.fits == (best <= 1)
    if estimate.fits:
        assert list(found) == sorted(found, key=lambda device: device.index)
        edges = [sum(device.index < each for device in found) for each in range(1, len(free))]
        assert len(found) == len(layers)
        assert share(edges) == pytest.approx(best, abs=1e-6)
        assert estimate.available == sum(free)


def test_layers_are_read_to_their_devices_as_transformers_reads_them(tmp_path, monkeypatch):
    model = make_model(**KINDS["gqa-biased-tied"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    asked = []
    read = StockModel.from_pretrained.__func__

    def noted(cls, *arguments, **named):
        asked.append(named["device_map"])
        return read(cls, *arguments, **named)

    monkeypatch.setattr(StockModel, "from_pretrained", classmethod(noted))
    whole = read_checkpoint(tmp_path, torch.float32)
    straight = read_checkpoint(tmp_path, torch.float32, device=CPUS[0])
    spread = spread_checkpoint(tmp_path, torch.float32, CPUS[0], [CPUS[0], CPUS[1], CPUS[1]])
    assert asked == [None, {"": CPUS[0]}, {"": CPUS[0]}]
    ids = torch.arange(2, 20)[None]
    for other in (straight, spread):
        assert same_weights(other, snapshot(whole))
        assert other.config.to_json_string() == whole.config.to_json_string()
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert not other.training
        assert not any(weight.requires_grad for weight in other.parameters())
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert not hasattr(other, "_hf_hook")


@pytest.fixture
def memory(monkeypatch):
    """Bytes that two devices have free, which are the CPU in truth; to be set."""
    free = {}
    for module in (devices, placement):
        monkeypatch.setattr(module, "free_memory", lambda device: free[device.index])
    monkeypatch.setattr(models, "resolve_devices", lambda name: CPUS)
    return free


@pytest.mark.parametrize(
    ("first", "second", "name", "offload", "outcome"),
    [
        (3.0, 3.0, "auto", "auto", "whole"),
        (0.9, 0.9, "auto", "auto", "spread"),
        (0.9, 0.9, "auto", "never", "spread"),
        (3.0, 3.0, "cuda:0,cuda:1", "never", "spread"),
        (0.9, 0.9, "auto", "always", "offloaded"),
        (0.6, 0.1, "auto", "auto", "offloaded"),
        (0.6, 0.1, "auto", "never", "refused"),
    ],
)
def test_where_a_model_goes_by_what_is_free(
    first, second, name, offload, outcome, tmp_path, tokenizer, memory, monkeypatch
):
    model = make_model(num_hidden_layers=6)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = 4 * model.num_parameters()
    memory |= {0: int(first * size), 1: int(second * size)}
    layouts = []

    def spreading(*arguments):
        layouts.append(arguments[3])
        return spread_checkpoint(*arguments)

    monkeypatch.setattr("transact_core.models.checkpoint_folder.spread_checkpoint", spreading)
    if outcome == "refused":
        words = r"Loading takes about .* GB of memory on cpu:0, cpu:1, where"
        with pytest.raises(TransActError, match=words):
            load_model(str(tmp_path), name, offload=offload)
        return
    loaded = load_model(str(tmp_path), name, offload=offload)
    assert bool(layouts) == (outcome == "spread")
    assert loaded.offloaded == (outcome == "offloaded")
    if layouts:
        # The first device holds embedding and LM head too.
        assert len(layouts[0]) == 6
        assert 0 < layouts[0].count(CPUS[0]) < layouts[0].count(CPUS[1])


def test_devices_are_named_one_by_one_or_all_of_a_kind(monkeypatch):
    cpu = (torch.device("cpu"),)
    assert resolve_devices("cpu") == cpu
    for wrong, words in (
        ("cuda:0,cuda:1", "The device 'cuda:0' is not available here"),
        ("cpu,cpu", "are not different GPUs; name them as cuda:0,cuda:1"),
        ("cpu,abacus", "The device 'abacus' is not available"),
    ):
        if torch.cuda.is_available() and "cuda" in wrong:
            continue
        with pytest.raises(TransActError, match=words):
            resolve_devices(wrong)
    monkeypatch.setattr(devices, "_present", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert resolve_devices("auto") == resolve_devices("cuda") == GPUS
    assert resolve_devices("cuda:1") == GPUS[1:2]
    assert resolve_devices("cuda:2, cuda:0") == (GPUS[2], GPUS[0])
    with pytest.raises(TransActError, match="not different GPUs"):
        resolve_devices("cuda:1,cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_devices("auto") == (torch.device("cuda"),)


def test_results_are_named_by_the_model_of_a_gpu_and_by_cuda(gqa_bench, monkeypatch):
    # The names of what was kept on a CPU before stay as they are.
    assert gqa_bench.identity["device"] == gqa_bench.loaded.hardware == "cpu"
    names = {0: "GPU A", 1: "GPU A", 2: "GPU B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert hardware(GPUS[:2]) == "GPU A, CUDA 13.0"
    assert hardware(GPUS) == "GPU A, CUDA 13.0 and GPU B, CUDA 13.0"
    # Whoever keeps a cluster's points has no such GPU.
    monkeypatch.setattr(models, "hardware", lambda devices: "GPU A, CUDA 13.0")
    released = gqa_bench.loaded.release()
    monkeypatch.undo()
    assert released.hardware == released.release().hardware == "GPU A, CUDA 13.0"


def test_a_gpu_is_asked_for_the_same_bits_each_time(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    require_same_bits(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        require_same_bits(GPUS[0])
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_the_host_needs_room_for_what_is_on_its_way(gqa_model):
    shape = Architecture.from_config(gqa_model.config)
    largest = max(prod(weight.shape) for weight in gqa_model.parameters())
    straight = estimate_host(shape, torch.bfloat16, gguf=False)
    assert straight.needed == TENSORS_ON_THE_WAY * 2 * largest
    converting = estimate_host(shape, torch.float16, gguf=True)
    assert converting.needed == (4 + 2) * gqa_model.num_parameters()
    assert converting.available == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_what_needs_one_device_is_refused_in_a_sentence(gqa_bench, monkeypatch):
    gqa_bench.loaded.require_one_device("Training")
    monkeypatch.setattr(models, "devices_of", lambda model: GPUS[:2])
    words = (
        "^Training needs the whole model on one device, and its layers .* cuda:0, cuda:1; choose"
    )
    with pytest.raises(TransActError, match=words):
        gqa_bench.loaded.require_one_device("Training")
