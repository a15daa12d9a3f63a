"""The token ids of tokenizers read from GGUF files are llama.cpp's.

llama.cpp is the one that `make runtimes` installs. Without it the tests fail in CI and are skipped
elsewhere.
"""

import json
import socket
import sys
import urllib.request

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_model
from tests.models.test_load import WIDE, write_gguf
from tests.trust.installed import runtime_folder
from transact_core.data.corpus import read_corpus
from transact_core.models.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_metadata
from transact_core.models.load import builtin_gguf

# Last on the path, and for this import alone: the folder holds packages of other versions too.
sys.path.append(str(runtime_folder("llama_cpp")))
import xllamacpp

sys.path.pop()

NASTY = (
    "Hello\n 1 22 333 4444 55555 666666 7777777 ½ ² Ⅻ ٣٤٥ don't DON'T I'LL we've it's Größe naïve "
    "\t\t  x\u00a0y \r\n\r\n 🎉👩‍👩‍👧 a_b1c2 ЖЗИ привет i̇ \u200b camelCaseWord HTTPServer foo/bar//\n\n"
    "  call();\ncall();\ncall();\n x == y != z; $100 + 5% <tag> ~^|` !!! ... (a|b),c?d! \"quoted\" 'single'   end   "
)
CASELESS = " 東京123, 一些中文字。ひらがなカタカナ 한국어 नमस्ते สวัสดี مرحبا"
"""Letters without case, of which llama.cpp only approximates some rules."""
APPROXIMATED = ("tekken", "gpt-4o", "llama4", "kanana2")


def ids_in_llama_cpp(path, texts, add_special: bool) -> list[list[int]]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        parameters.port = free.getsockname()[1]
    server = xllamacpp.Server(parameters)
    found = []
    for text in texts:
        question = {"content": text, "add_special": add_special, "parse_special": True}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.loads(answer.read())["tokens"])
    return found


def tokenizer_of(path) -> PreTrainedTokenizerFast:
    fields = gguf.GGUFReader(path).fields
    return tokenizer_from_metadata({key: field.contents() for key, field in fields.items()})


@pytest.fixture(scope="module")
def greedy():
    """A tokenizer with merges across all kinds of boundaries, so that each split is seen."""
    trained = Tokenizer(models.BPE())
    bounds = pre_tokenizers.Split(Regex(r".{40}"), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([bounds, bytes_only])
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    corpus = [(NASTY + CASELESS + "\n") * 8, read_corpus("builtin").text[:8_000]]
    trained.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")


RULES = {rule: name for name, rule in reversed(PRE_TOKENIZERS.items())}


@pytest.mark.parametrize("name", sorted(RULES.values()))
def test_each_rule_gives_llama_cpps_ids(greedy, tmp_path, name):
    model = make_model(**WIDE | {"vocab_size": len(greedy), "num_hidden_layers": 1})
    path = write_gguf(tmp_path / "x.gguf", model, greedy, metadata={"tokenizer.ggml.pre": name})
    texts = [NASTY, read_corpus("builtin").text[8_000:20_000]]
    texts += [] if name in APPROXIMATED else [CASELESS]
    mine = tokenizer_of(path)
    for text, ids in zip(texts, ids_in_llama_cpp(path, texts, add_special=True), strict=True):
        assert mine(text)["input_ids"] == ids


def test_the_texts_tell_the_rules_apart(greedy):
    """Otherwise the test above would prove nothing."""
    model = json.loads(greedy.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }
    text = NASTY + read_corpus("builtin").text[8_000:20_000]
    seen = {
        name: tokenizer_from_metadata(metadata | {"tokenizer.ggml.pre": name})(text)["input_ids"]
        for name in RULES.values()
    }
    assert len({tuple(ids) for ids in seen.values()}) == len(RULES)


@pytest.mark.builtin
def test_the_built_in_models_ids_are_llama_cpps():
    path = builtin_gguf()
    reference = read_corpus("builtin").text
    chat = "<|im_start|>user\n1 22 333 Größe 東京<|im_end|>\n" + NASTY
    mine = tokenizer_of(path)
    texts = (reference, chat)
    for text, ids in zip(texts, ids_in_llama_cpp(path, texts, add_special=False), strict=True):
        assert mine(text)["input_ids"] == ids
