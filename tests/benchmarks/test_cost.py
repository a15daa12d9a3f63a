from benchmarks import cost, memory
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


def test_peak_memory_is_the_process_s_own():
    ballast = bytearray(400_000_000)
    assert memory.peak_memory() > len(ballast)
    assert memory.peak_memory_of("platform", []) < len(ballast)
