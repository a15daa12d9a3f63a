"""Small random LLaMA models of every kind the engine takes, and a tokenizer to go with them."""

import copy
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.trust.hub import TOKEN, hub_of
from transact_core.data.corpus import BUILTIN_TEXTS, corpus_from_text, read_corpus
from transact_core.data.windows import WindowSpec, make_windows
from transact_core.experiments.bench import Bench
from transact_core.models.architecture import Architecture
from transact_core.models.load import LoadedModel

# Machines are busy at times, and no test is about how long an example takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: one thread each, here and in the processes that tests start.
    os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Browser tests come first: they take longest and wait most, so that all processes end at about
    the same time."""
    items.sort(key=lambda item: item.get_closest_marker("browser") is None)


VOCAB_SIZE = 320
KINDS = {
    "mha": {"num_key_value_heads": 6},
    "gqa": {"num_key_value_heads": 3},
    "gqa-tied": {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "mha-biased": {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    "gqa-biased-tied": {
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "wide-heads": {"num_key_value_heads": 3, "head_dim": 16},
}


FEW_KINDS = ("mha", "gqa-biased-tied", "wide-heads")
"""Kinds that differ in all that distinguishes the others, for tests that are slow."""


def made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """A folder that the first of the test processes makes, and for which the others wait."""
    with FileLock(f"{place}.lock"):
        done = place / ".done"
        if not done.exists():
            # There already where an earlier attempt to make it failed.
            place.mkdir(exist_ok=True)
            make(place)
            done.touch()
    return place


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that the test processes of one run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory, shared):
    """Keeps what the tests measure out of the user's cache.

    Each test process has a cache of its own, but for converted models: those they share.
    """
    folder = tmp_path_factory.mktemp("cache")
    (shared / "models").mkdir(exist_ok=True)
    (folder / "models").symlink_to(shared / "models")
    before = os.environ.get("TRANSACT_CACHE")
    os.environ["TRANSACT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TRANSACT_CACHE"]
    else:
        os.environ["TRANSACT_CACHE"] = before


@pytest.fixture(scope="session")
def converted_builtin(cache, shared) -> None:
    """Converts the built-in model, once for all test processes, before anything opens it.

    In a process of its own, whose memory is free again afterwards.
    """
    load = "from transact_core.models.load import load_model; load_model('builtin')"

    def convert(_: Path) -> None:
        subprocess.run([sys.executable, "-c", load], check=True, cwd=Path(__file__).parents[1])

    made_once(shared / "builtin", convert)


def devices() -> list:
    """Parameters of a fixture or a test: the CPU, and CUDA, which is skipped without a GPU."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
    return [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=without)]


@pytest.fixture(params=devices(), ids=str)
def device(request) -> torch.device:
    """What a test of the engine computes on: every kind of device that is there."""
    return request.param


def make_tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([read_corpus("builtin").text[:20_000]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "initializer_range": 0.2,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=KINDS)
def model(request) -> LlamaForCausalLM:
    return make_model(**KINDS[request.param])


@pytest.fixture
def gqa_model() -> LlamaForCausalLM:
    return make_model(**KINDS["gqa"])


def fingerprint(model: LlamaForCausalLM) -> str:
    """Of the weights: what is measured on a model is kept under it."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def loaded_from(model: LlamaForCausalLM, tokenizer) -> LoadedModel:
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        architecture=Architecture.from_config(model.config),
        source="a/model",
        weight_files={"model.safetensors": fingerprint(model)},
        source_dtype=model.dtype,
    )


def windows_for(tokenizer, calibration_tokens=1024, evaluation_tokens=256, sequence_length=32):
    text = corpus_from_text("builtin", read_corpus("builtin").text[:30_000])
    spec = WindowSpec(
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
        sequence_length=sequence_length,
    )
    return make_windows(spec, tokenizer, VOCAB_SIZE, texts=(text, text))


@pytest.fixture
def windows(tokenizer):
    return windows_for(tokenizer)


def bench_of(model: LlamaForCausalLM, tokenizer, windows) -> Bench:
    return Bench(loaded_from(model, tokenizer), *windows)


@pytest.fixture
def bench(model, tokenizer, windows) -> Bench:
    return bench_of(model, tokenizer, windows)


@pytest.fixture
def gqa_bench(gqa_model, tokenizer, windows) -> Bench:
    return bench_of(gqa_model, tokenizer, windows)


@pytest.fixture
def checkpoint(gqa_model, tokenizer, tmp_path):
    """A checkpoint folder as any tool would have written it."""
    folder = tmp_path / "checkpoint"
    gqa_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(read_corpus("builtin").text[:30_000])
    return path


@pytest.fixture
def short_texts(monkeypatch):
    """Widths are allocated, and trainings are watched, by the beginnings of the built-in texts: all
    of them take seconds to be tokenised."""

    def beginning(source):
        corpus = read_corpus(source)
        built_in = source in BUILTIN_TEXTS
        return replace(corpus, text=corpus.text[:40_000]) if built_in else corpus

    for module in ("experiments.allocate", "export.tune"):
        monkeypatch.setattr(f"transact_core.{module}.read_corpus", beginning)


def snapshot(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same_weights(model: LlamaForCausalLM, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of an empty hub that takes what comes with `TOKEN`."""
    place = tmp_path / "on-the-hub"
    place.mkdir()
    server = hub_of(place, 0, token=TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield place
    server.shutdown()
    server.server_close()
