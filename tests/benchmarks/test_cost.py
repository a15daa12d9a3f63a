import pytest

from benchmarks import cost, layer, memory
from transact_core.forward.statistics import collect


def test_every_pass_is_set_against_the_plain_one(gqa_model, windows):
    found = cost.ratios_to_plain({"scoring": collect}, gqa_model, windows[0], rounds=3)
    assert set(found) == {"scoring"}
    assert len(found["scoring"]) == 3
    assert all(ratio > 0 for ratio in found["scoring"])


def test_a_random_model_is_one_the_engine_takes(checkpoint, tmp_path):
    from transact_core.models.load import load_model

    folder = tmp_path / "random"
    folder.mkdir()
    architecture = cost.write_random_model(folder, 2, 192, tokenizer_of=str(checkpoint))
    loaded = load_model(str(folder))
    assert loaded.architecture == architecture
    assert loaded.model.num_parameters() == architecture.parameters


@pytest.mark.parametrize("work", layer.WORK)
def test_one_layer_of_a_shape_is_repaired_scored_and_estimated(work, monkeypatch, capsys):
    monkeypatch.setitem(layer.SHAPES, "tiny", (32, 48, 4, 2, 8))
    monkeypatch.setattr(layer, "VOCAB_SIZE", 64)
    found = layer._measure("tiny", work, 1024, 1)
    assert set(found) == {"plain", "ratio", "by_clock", "memory"}
    assert found["ratio"] > 0
    if work == "repair":
        # The layer is worth measuring: a repair helps, and does not do everything.
        for line in capsys.readouterr().err.splitlines():
            bare, recovered = (float(number) for number in line.split()[1:3])
            assert 0.1 * bare < recovered < bare


def test_peak_memory_is_the_process_s_own():
    ballast = bytearray(400_000_000)
    assert memory.peak_memory() > len(ballast)
    assert memory.peak_memory_of("platform", []) < len(ballast)
