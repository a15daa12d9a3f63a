"""The estimate of a cut's memory, against what is counted, and its refusal in a sentence."""

import pytest
import torch

from transact_core.base.errors import TransActError
from transact_core.experiments import bench as benches
from transact_core.experiments.bench import Choices, compress, require_memory
from transact_core.planning.memory_needed import cut_bytes
from transact_core.pruning.surgery import prune


@pytest.mark.parametrize(("mha", "mlp"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.3), (0.5, 0.3)])
def test_a_bare_cut_takes_the_tensors_that_it_does_not_share(gqa_bench, mha, mlp):
    plan = gqa_bench.plan(mha, mlp, Choices())
    dense, shape = gqa_bench.loaded.model, gqa_bench.loaded.architecture
    cut = prune(dense, plan)
    theirs = {tensor.data_ptr() for tensor in dense.parameters()}
    own = sum(each.nbytes for each in cut.parameters() if each.data_ptr() not in theirs)
    assert cut_bytes(shape, plan.applied_to(shape), "none", 10_000, 4) == own


def test_a_repair_takes_more_with_the_text_and_the_width(gqa_bench):
    shape = gqa_bench.loaded.architecture
    cut = gqa_bench.plan(0.0, 0.3, Choices()).applied_to(shape)
    bare, bias, few, many = (
        cut_bytes(shape, cut, recovery, tokens, 4)
        for recovery, tokens in (
            ("none", 1000),
            ("bias", 1000),
            ("least-squares", 1000),
            ("least-squares", 5000),
        )
    )
    assert bare < bias < few < many
    # Nothing is repaired where nothing is cut.
    assert cut_bytes(shape, shape, "least-squares", 1000, 4) == 0


def test_a_cut_that_does_not_fit_is_refused_before_it_is_made(gqa_bench, monkeypatch):
    plan = gqa_bench.plan(0.5, 0.3, Choices())
    monkeypatch.setattr(benches, "free_memory", lambda device: 1000)
    monkeypatch.setattr(benches, "repaired_cut", None)
    with pytest.raises(TransActError, match="GB of memory on cpu beside the dense model"):
        compress(gqa_bench, plan, "least-squares")


def test_each_device_needs_room_for_its_own_layers(gqa_bench, monkeypatch):
    plan, shape = gqa_bench.plan(0.5, 0.3, Choices()), gqa_bench.loaded.architecture
    left, recovery = plan.applied_to(shape), "least-squares"
    many, few = (cut_bytes(shape, left, recovery, 1024, 4, layers=part) for part in ([1, 2], [0]))
    bare = [cut_bytes(shape, left, "none", 1024, 4, layers=part) for part in ([1, 2], [0])]
    assert sum(bare) == cut_bytes(shape, left, "none", 1024, 4)
    assert few < many
    one, other = (torch.device("cuda", index) for index in range(2))
    monkeypatch.setattr(benches, "layout_of", lambda model: (one, other, other))
    monkeypatch.setattr(type(gqa_bench.loaded), "devices", (one, other))
    free = {one: few, other: many}
    monkeypatch.setattr(benches, "free_memory", free.__getitem__)
    require_memory(gqa_bench, plan, recovery)
    free[other] -= 1
    with pytest.raises(TransActError, match="GB of memory on cuda:1 beside the dense model"):
        require_memory(gqa_bench, plan, recovery)
