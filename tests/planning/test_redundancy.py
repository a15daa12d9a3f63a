import pytest
import torch

from tests.conftest import bench_of
from transact_core.experiments.bench import Choices
from transact_core.forward.waists import head_rows
from transact_core.planning.redundancy import kept_channels, kept_share, written_energies


@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups", "head-dims"])
def test_kept_channels_are_those_of_the_plan(model, tokenizer, windows, granularity):
    bench = bench_of(model, tokenizer, windows)
    shape = bench.loaded.architecture
    plan = bench.plan(0.4, 0.3, Choices(granularity=granularity))
    kept = kept_channels(plan, shape)
    for number, layer in enumerate(plan.layers):
        assert kept["mlp"][number].nonzero().flatten().tolist() == list(layer.kept_channels)
        if granularity == "head-dims":
            expected = [
                head * shape.head_dim + dim
                for head in range(shape.num_attention_heads)
                for dim in layer.value_dims[head // shape.queries_per_group]
            ]
        else:
            expected = head_rows(layer.kept_heads, shape.head_dim).tolist()
        assert kept["mha"][number].nonzero().flatten().tolist() == expected


def test_kept_share_is_a_plain_sum():
    energies = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    kept = torch.tensor([[True, False, True], [False, True, False]])
    assert kept_share(energies, kept).tolist() == [0.75, 1.0]


def test_written_energies_are_those_of_each_channel_alone(gqa_bench):
    written = written_energies(gqa_bench.scores("activation-weight"))
    statistics, model = gqa_bench.statistics(), gqa_bench.loaded.model
    for number, channel in ((0, 3), (2, 17)):
        columns = {
            "mha": model.model.layers[number].self_attn.o_proj.weight[:, channel],
            "mlp": model.model.layers[number].mlp.down_proj.weight[:, channel],
        }
        for module, column in columns.items():
            squares = getattr(statistics, module).sum_of_squares[number, channel]
            expected = squares * column.double().square().sum()
            assert written[module][number, channel].item() == pytest.approx(
                expected.item(), rel=1e-5
            )
