"""What the built-in model takes on a GPU, and one page there; the figures are written down.

    python -m pytest tests/device -n 0                                # with a GPU: within ten minutes
    TRANSACT_TEST_DEVICE=cpu python -m pytest tests/device -n 0       # the same code, a tiny model

The figures, with the GPU's model and the version of CUDA, are in `figures.json` of the folder that
the variable OUT names, or of pytest's own, which is said at the end (`-s` shows it).
"""

from dataclasses import replace

import pytest
import torch

from pages.server.request import Request
from pages.server.settings import read_settings
from pages.server.visitors import Visit
from tests.conftest import make_model
from tests.device.conftest import NAMED, named_device
from tests.device.test_engine import DTYPES, SHAPE, TOLERANCE
from tests.pages.conftest import (  # noqa: F401 - fixtures
    ended,
    exchange,
    open_page,
    opened,
    own_workbench,
)
from tests.pages.test_pages import metrics, work_of
from transact_core.data.windows import WindowSpec
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.cut_spec import BenchSpec, open_bench
from transact_core.forward.generation import generate, tokens_per_second
from transact_core.forward.perplexity import evaluate
from transact_core.models.devices import dtype_name
from transact_core.models.load import load_model

pytestmark = pytest.mark.skipif(
    not named_device(), reason=f"there is no GPU here; {NAMED}=cpu runs this on the CPU"
)
RATIOS = 0.34, 0.3


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


@pytest.fixture
def empty_cache(tmp_path, monkeypatch, converted_builtin, cache):
    """Nothing is remembered but the built-in model's conversion."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "models").symlink_to((cache / "models").resolve())
    monkeypatch.setenv("TRANSACT_CACHE", str(folder))


@pytest.fixture
def spec(measured_on, dtype, tokenizer, text_file, tmp_path, request) -> BenchSpec:
    """The built-in model with the command line's defaults; on the CPU a tiny one, on little text."""
    if measured_on.type != "cpu":
        request.getfixturevalue("empty_cache")
        return BenchSpec("builtin", str(measured_on), dtype, WindowSpec())
    folder = tmp_path / "model"
    make_model(**SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    windows = WindowSpec(str(text_file), str(text_file), 1024, 256, 32)
    return BenchSpec(str(folder), str(measured_on), dtype, windows)


def test_a_model_is_cut_and_repaired(spec, dtype, figures):
    with figures.of(f"{dtype}: load") as found:
        bench = open_bench(spec)
        found["model"] = bench.loaded.name
        found["tokens"] = [bench.calibration.tokens, bench.evaluation.tokens]
    with figures.of(f"{dtype}: dense perplexity") as found:
        found["perplexity"] = bench.dense().perplexity
    with figures.of(f"{dtype}: statistics"):
        bench.statistics()
    with figures.of(f"{dtype}: elimination"):
        bench.scores("reconstruction")
    plan = bench.plan(*RATIOS, Choices(importance="reconstruction"))
    with figures.of(f"{dtype}: cut, repair, perplexity") as found:
        pruned, measured = compress(bench, plan, "least-squares")
        found["perplexity"] = measured.perplexity
    with figures.of(f"{dtype}: the same again") as found:
        again = compress(bench, plan, "least-squares")[1]
        # Not promised on a GPU, so it is a figure and nothing that must hold.
        found["same bits"] = torch.equal(again.evaluation.nll, measured.evaluation.nll)
    bare = compress(bench, plan, "none")[1]
    assert measured.perplexity < bare.perplexity
    assert {weight.device.type for weight in pruned.parameters()} == {bench.loaded.device.type}
    # The same weights on the CPU, in float32.
    on_cpu = load_model(spec.model, "cpu", "float32").model
    few = replace(bench.evaluation, ids=bench.evaluation.ids[:1])
    ours, expected = (evaluate(model, few).perplexity for model in (bench.loaded.model, on_cpu))
    assert ours == pytest.approx(expected, rel=TOLERANCE[dtype])
    with figures.of(f"{dtype}: generation") as found:
        written = list(generate(pruned, bench.evaluation.ids[0, :16].tolist(), 16))
        found["tokens a second"] = tokens_per_second(written)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")
def test_layers_laid_over_all_gpus_give_the_same_perplexity(dtype, figures, empty_cache):
    names = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    windows, choices = WindowSpec(), Choices()
    found = []
    for device in ("cuda:0", names):
        with figures.of(f"{dtype}: cut and repair on {device}") as figure:
            bench = open_bench(BenchSpec("builtin", device, dtype, windows))
            point = compress(bench, bench.plan(*RATIOS, choices), "least-squares")[1]
            figure["perplexity"] = point.perplexity
        found.append((bench.dense().perplexity, point.perplexity, len(bench.loaded.devices)))
    (one, cut, _), (spread, spread_cut, devices) = found
    assert devices == torch.cuda.device_count()
    assert (spread, spread_cut) == pytest.approx((one, cut), rel=TOLERANCE[dtype])


def test_the_compress_page_cuts_there(
    measured_on,
    dtype,
    figures,
    open_page,  # noqa: F811
    opened,  # noqa: F811
    tokenizer,
    text_file,
    tmp_path,
    monkeypatch,
):
    folder = tmp_path / "model"
    make_model(**SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    allowed = read_settings({"TRANSACT_READ_FOLDERS": str(tmp_path)}, "localhost")
    exchange(monkeypatch, "settings", lambda: allowed)
    mine = Visit()
    mine.request = Request(
        str(folder),
        str(measured_on),
        dtype,
        str(text_file),
        str(text_file),
        calibration_tokens=512,
        evaluation_tokens=256,
        sequence_length=32,
    )
    with figures.of(f"{dtype}: the Compress page"):
        opening = opened.open(mine.request)
        ended(opening.dense)
        page = open_page("compress", mine)
        point = work_of(page, "Prune and measure perplexity").result
        page.run()
    assert not page.exception
    assert metrics(page)["Perplexity, measured"] == f"{point.perplexity:.2f}"
    bench = opening.bench.result
    assert bench.loaded.device.type == measured_on.type
    assert dtype_name(bench.loaded.dtype) == dtype
