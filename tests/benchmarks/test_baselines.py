import pytest

from benchmarks.baselines import BASELINES, BaselineFailed
from benchmarks.cuts import CUTS, Cut
from tests.conftest import make_model, same_weights, snapshot
from transact_core.models.architecture import Architecture

PACKAGES = {"optipfair": "optipfair", "Torch-Pruning": "torch_pruning"}
MLP = Cut("mlp", 0, 0.3)
HEADS = Cut("heads", 1 / 3, 0)
BOTH = Cut("both", 1 / 3, 0.3)
KV_CACHE = Cut("kv", 1 / 3, 0, narrows_kv_cache=True)
CASES = [
    (name, cut)
    for name, other in BASELINES.items()
    for cut in (MLP, HEADS, BOTH, KV_CACHE)
    if other.offers(cut)
]


def needs(name: str) -> None:
    pytest.importorskip(PACKAGES[name.split(":")[0]])


@pytest.fixture
def nine_heads():
    """Three queries in each of three groups, as the built-in model has them."""
    return make_model(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)


def run(name, model, tokenizer, windows, cut):
    return BASELINES[name](
        model, tokenizer, windows[0], cut.target(Architecture.from_config(model.config))
    )


@pytest.mark.parametrize(
    ("name", "cut"), CASES, ids=lambda part: part if isinstance(part, str) else part.name
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_baseline_cuts_rows_and_columns_of_the_dense_model(
    name, cut, nine_heads, tokenizer, windows
):
    needs(name)
    before = snapshot(nine_heads)
    if cut is KV_CACHE and "Torch" in name:
        with pytest.raises(BaselineFailed, match="key-value heads"):
            run(name, nine_heads, tokenizer, windows, cut)
        return
    pruned = run(name, nine_heads, tokenizer, windows, cut)
    assert same_weights(nine_heads, before)
    target = cut.target(Architecture.from_config(nine_heads.config))
    if "layers" in name:
        assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 2
        return
    assert pruned.config.num_attention_heads == target.num_attention_heads
    assert pruned.config.num_key_value_heads == target.num_key_value_heads
    assert pruned.config.intermediate_size == target.intermediate_size
    for dense, cut_layer in zip(nine_heads.model.layers, pruned.model.layers, strict=True):
        channels = rows_kept(dense.mlp.gate_proj, cut_layer.mlp.gate_proj)
        assert channels == rows_kept(dense.mlp.up_proj, cut_layer.mlp.up_proj)
        assert channels == columns_kept(dense.mlp.down_proj, cut_layer.mlp.down_proj)
        queries = rows_kept(dense.self_attn.q_proj, cut_layer.self_attn.q_proj)
        assert queries == columns_kept(dense.self_attn.o_proj, cut_layer.self_attn.o_proj)
        groups = rows_kept(dense.self_attn.v_proj, cut_layer.self_attn.v_proj)
        assert groups == rows_kept(dense.self_attn.k_proj, cut_layer.self_attn.k_proj)
        # Every kept query still reads its own group.
        assert {query // 24 for query in queries} == {group // 8 for group in groups}


def rows_kept(dense, pruned):
    matches = (dense.weight[None] == pruned.weight[:, None]).all(dim=2)
    assert (matches.sum(dim=1) == 1).all()
    return matches.nonzero()[:, 1].tolist()


def columns_kept(dense, pruned):
    matches = (dense.weight.T[None] == pruned.weight.T[:, None]).all(dim=2)
    assert (matches.sum(dim=1) == 1).all()
    return matches.nonzero()[:, 1].tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_cut_that_was_not_made_is_reported(nine_heads, tokenizer, windows):
    needs("Torch-Pruning")
    with pytest.raises(BaselineFailed, match="widths"):
        run("Torch-Pruning: magnitude", nine_heads, tokenizer, windows, Cut("heads", 2 / 3, 0))


def test_every_cut_has_a_baseline():
    assert all(any(other.offers(cut) for other in BASELINES.values()) for cut in CUTS)
