"""Files that claim absurd sizes or point outside of their folder, read with bounded memory.

    python -m tests.trust.absurd

Each case must be refused by a TransActError of one line, within `SECONDS` and with `ROOM` bytes of
address space on top of what the imports use. A case that is read but changes nothing raises the
TransActError "harmless". Prints one JSON object per case, and the peak memory of the process.
"""

import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, make_tokenizer
from tests.models.test_load import write_gguf
from transact_core.base.errors import TransActError
from transact_core.data.corpus import read_corpus
from transact_core.data.windows import tokenise
from transact_core.export.compression import read_compression
from transact_core.models.load import load_model

SECONDS = 20
"""Time limit of a case. The slowest takes a few seconds on a quiet machine."""
ROOM = 1_500_000_000
"""Bytes of address space for reading a file. Files that claim sizes mostly claim far more."""
TERABYTE = 2**40
"""In bytes. Files of this size are sparse and take no space on the disk."""
Case = tuple[str, Callable[[], object]]
"""The name of a case and the call that must raise a TransActError."""


def edited(path: Path, **changes: object) -> None:
    """Changes some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copied(model: Path, name: str) -> Path:
    """A copy of the checkpoint folder, to be damaged."""
    folder = model.parent / name.replace("/", "-").replace(" ", "-")
    shutil.copytree(model, folder)
    return folder


# --- checkpoint folders ----------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "a million layers": {"num_hidden_layers": 10**6},
    "10^18 layers": {"num_hidden_layers": 10**18},
    "hidden size 2^40": {"hidden_size": TERABYTE, "head_dim": 8},
    "vocabulary 2^60": {"vocab_size": 2**60},
    "MLP width 2^62": {"intermediate_size": 2**62},
    "a negative width": {"intermediate_size": -1},
    "no heads": {"num_attention_heads": 0},
    "no key-value heads": {"num_key_value_heads": 0},
    "head_dim 0": {"head_dim": 0},
    "an odd head_dim": {"head_dim": 7},
    "a fraction of a layer": {"num_hidden_layers": 2.5},
    "layers as text": {"num_hidden_layers": "3"},
    "layers as a list": {"num_hidden_layers": [3]},
    "layers that are true": {"num_hidden_layers": True},
    "a width of none": {"hidden_size": None},
    "a width of infinity": {"hidden_size": float("inf")},
    "a width that is not a number": {"intermediate_size": float("nan")},
    "an activation that is none": {"hidden_act": "no_such_function"},
    "an activation that is a list": {"hidden_act": ["silu"]},
    "another activation": {"hidden_act": "gelu"},
    "an epsilon of text": {"rms_norm_eps": "small"},
    "an epsilon that is not a number": {"rms_norm_eps": float("nan")},
    "a negative epsilon": {"rms_norm_eps": -1.0},
    "rotary parameters of text": {"rope_parameters": "default"},
    "a rotary base of text": {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
    "a rotary base of 0": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "a negative rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}},
    "a rotary type that is a list": {"rope_parameters": {"rope_type": ["default"]}},
    "long factors of the wrong number": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "short_factor": [1.0] * 3,
            "long_factor": [1.0] * 99,
            "original_max_position_embeddings": 256,
        }
    },
    "no rotary factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
    "positions 2^70": {"max_position_embeddings": 2**70},
    "positions of text": {"max_position_embeddings": "many"},
    "tied of text": {"tie_word_embeddings": "maybe"},
    "biases of text": {"attention_bias": "maybe"},
    "a list of architectures of lists": {"architectures": [["LlamaForCausalLM"]]},
    "a type that is a list": {"model_type": ["llama"]},
    "a quantisation of text": {"quantization_config": "all of it"},
    "heads that do not divide": {"num_attention_heads": 5, "num_key_value_heads": 5},
    "a padding token beyond the vocabulary": {"pad_token_id": 10**9},
    "dropout of text": {"attention_dropout": "some"},
    "tensor parallel slices": {"pretraining_tp": 10**9},
    "attentions to be kept": {"output_attentions": True},
    "hidden states to be kept": {"output_hidden_states": True},
    "tuples": {"return_dict": False},
    "labels of text": {"num_labels": "x"},
    "labels by the million": {"num_labels": 10**9},
}
"""Changes to `config.json`. Each must be refused, or be harmless: the model gives numbers."""


def configuration_cases(model: Path) -> Iterator[Case]:
    for name, changes in CONFIGURATIONS.items():
        folder = copied(model, name)
        edited(folder / "config.json", **changes)
        yield f"config.json: {name}", lambda folder=folder: same_numbers(folder, model)
    for name, content in {
        "nested without end": b'{"a":' * 200_000,
        "a number of a million digits": b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
        "bytes of no encoding": b"\xff\xfe\x00",
        "a list": b"[]",
        "nothing": b"",
        "keys twice": b'{"model_type": "llama", "model_type": "bert"}',
    }.items():
        folder = copied(model, f"config {name}")
        (folder / "config.json").write_bytes(content)
        yield f"config.json: {name}", lambda folder=folder: load_model(str(folder))
    folder = copied(model, "a config of a terabyte")
    os.truncate(folder / "config.json", TERABYTE)
    yield "config.json: a terabyte", lambda folder=folder: load_model(str(folder))


def same_numbers(folder: Path, model: Path) -> None:
    """Raises ArithmeticError if the folder loads without an error but its logits are not finite."""
    loaded, plain = load_model(str(folder)), load_model(str(model))
    ids = torch.arange(40)[None] % 300
    with torch.inference_mode():
        changed, expected = (
            source.model(ids, use_cache=False).logits for source in (loaded, plain)
        )
    if not torch.equal(changed, expected) and not changed.isfinite().all():
        raise ArithmeticError("the logits are not finite, and no error was raised")
    raise TransActError("harmless")


def safetensors_header(claim: int | None, header: object, body: bytes = b"") -> bytes:
    """A safetensors file; `claim` replaces the true length of its header in bytes."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claim is None else claim) + text + body


def weight_cases(model: Path) -> Iterator[Case]:
    tensor = "model.norm.weight"
    ok = {"dtype": "F32", "shape": [48], "data_offsets": [0, 192]}
    headers = {
        "a header of terabytes": safetensors_header(TERABYTE, {}),
        "a header of 2^64 - 1 bytes": safetensors_header(2**64 - 1, {}),
        "a tensor of terabytes": safetensors_header(
            None, {tensor: {**ok, "shape": [TERABYTE], "data_offsets": [0, 4 * TERABYTE]}}
        ),
        "offsets that overlap": safetensors_header(
            None, {tensor: ok, "lm_head.weight": ok}, b"\0" * 192
        ),
        "offsets that run backwards": safetensors_header(
            None, {tensor: {**ok, "data_offsets": [192, 0]}}, b"\0" * 192
        ),
        "a shape that is not its bytes": safetensors_header(
            None, {tensor: {**ok, "shape": [49]}}, b"\0" * 192
        ),
        "a shape that overflows": safetensors_header(
            None, {tensor: {**ok, "shape": [2**33, 2**33]}}, b"\0" * 192
        ),
        "a negative shape": safetensors_header(None, {tensor: {**ok, "shape": [-48]}}, b"\0" * 192),
        "a type that is none": safetensors_header(None, {tensor: {**ok, "dtype": "F7"}}),
        "a header that is a list": safetensors_header(None, [ok]),
        "a header nested without end": struct.pack("<Q", 10**6) + b'{"a":' * 200_000,
        "a pickle": b"\x80\x04\x95" + b"\0" * 100,
    }
    for name, content in headers.items():
        folder = copied(model, f"weights {name}")
        (folder / "model.safetensors").write_bytes(content)
        yield f"safetensors: {name}", lambda folder=folder: load_model(str(folder))
    folder = copied(model, "weights with a hole")
    os.truncate(folder / "model.safetensors", TERABYTE)
    yield (
        "safetensors: a terabyte of nothing at the end",
        lambda folder=folder: load_model(str(folder)),
    )
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 48, dtype=torch.int64)
    folder = copied(model, "weights of integers")
    save_file(tensors, folder / "model.safetensors")
    yield "safetensors: integers", lambda folder=folder: load_model(str(folder))
    for name, target in {
        "a path above": "../model/model.safetensors",
        "an absolute path": str(model / "model.safetensors"),
        "a folder": ".",
        "the folder above": "..",
        "nothing": "",
        "a name without end": "x" * 5000,
        "a name with a null byte": "a\0b",
        "a number": 7,
        "a list": [],
        "a pickle": "pytorch_model.bin",
    }.items():
        folder = copied(model, f"index {name}")
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        yield f"shards' index: {name}", lambda folder=folder: load_model(str(folder))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        folder = copied(model, f"link {name}")
        (folder / name).unlink()
        (folder / name).symlink_to(model / name)
        yield f"a link out of the folder: {name}", lambda folder=folder: load_model(str(folder))
    folder = copied(model, "a link to itself")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    yield "a link to itself", lambda folder=folder: load_model(str(folder))
    for name in ("config.json", "model.safetensors"):
        folder = copied(model, f"a pipe {name}")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        yield f"{name}: a pipe", lambda folder=folder: load_model(str(folder))
    folder = copied(model, "code")
    edited(
        folder / "config.json",
        auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        attn_implementation="kernels-community/nothing",
        custom_pipelines={"x": {"impl": "code.P"}},
    )
    (folder / "code.py").write_text("raise SystemExit('was run')")
    yield "code beside the weights", lambda folder=folder: same_numbers(folder, model)
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "model.pth", "model.ckpt"):
        path = model.parent / name
        path.write_bytes(b"cos\nsystem\n(S'touch /tmp/was-run'\ntR.")
        yield f"a pickle: {name}", lambda path=path: load_model(str(path))


def tokenizer_cases(model: Path) -> Iterator[Case]:
    stored = json.loads((model / "tokenizer.json").read_text())

    def changed(name: str, **changes: object) -> Path:
        folder = copied(model, f"tokenizer {name}")
        (folder / "tokenizer.json").write_text(json.dumps(stored | changes))
        return folder

    text = read_corpus("builtin")

    def use(folder: Path) -> None:
        loaded = load_model(str(folder))
        tokenise(text, loaded.tokenizer, loaded.architecture.vocab_size)
        raise TransActError("harmless")

    huge = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 200}
    cases = {
        "padding to a terabyte": changed(
            "padding",
            padding={
                "strategy": {"Fixed": TERABYTE},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            },
        ),
        "truncation to nothing": changed(
            "truncation",
            truncation={
                "max_length": 0,
                "strategy": "LongestFirst",
                "stride": 0,
                "direction": "Right",
            },
        ),
        "text that grows without end": changed(
            "growing", normalizer={"type": "Sequence", "normalizers": [huge] * 8}
        ),
        "an expression that never ends": changed(
            "endless",
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(([a-z ]+)+)+§"},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
        "an expression that is none": changed(
            "no expression",
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
        "no model": changed("no model", model=None),
        "a model that is none": changed("other model", model={"type": "Oracle"}),
        "ids beyond the vocabulary": changed(
            "ids",
            model=stored["model"]
            | {"vocab": {k: v + 10**6 for k, v in stored["model"]["vocab"].items()}},
        ),
        "ids of text": changed("ids of text", model=stored["model"] | {"vocab": {"a": "b"}}),
        "an empty vocabulary": changed(
            "empty", model=stored["model"] | {"vocab": {}, "merges": []}
        ),
        "merges of nothing": changed("merges", model=stored["model"] | {"merges": [["§", "§§"]]}),
        "an added token at 2^31": changed(
            "added",
            added_tokens=[
                {
                    "id": 2**31,
                    "content": "e",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ],
        ),
        "a post-processor without its token": changed(
            "post",
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "Z", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
    }
    for name, folder in cases.items():
        yield f"tokenizer.json: {name}", lambda folder=folder: use(folder)
    for name, content in {"a list": b"[]", "nested": b'{"a":' * 100_000, "bytes": b"\xff"}.items():
        folder = copied(model, f"tokenizer bytes {name}")
        (folder / "tokenizer.json").write_bytes(content)
        yield f"tokenizer.json: {name}", lambda folder=folder: use(folder)
        folder = copied(model, f"tokenizer config {name}")
        (folder / "tokenizer_config.json").write_bytes(content)
        yield f"tokenizer_config.json: {name}", lambda folder=folder: use(folder)
        folder = copied(model, f"generation {name}")
        (folder / "generation_config.json").write_bytes(content)
        yield f"generation_config.json: {name}", lambda folder=folder: use(folder)
    for name, changes in {
        "a length of text": {"model_max_length": "long"},
        "a class that is a list": {"tokenizer_class": ["x"]},
        "a class of another kind": {"tokenizer_class": "BertTokenizer"},
        "a token of numbers": {"bos_token": 7},
        "added tokens of text": {"added_tokens_decoder": {"x": "y"}},
        "padding on no side": {"padding_side": "up"},
    }.items():
        folder = copied(model, f"tokenizer settings {name}")
        edited(folder / "tokenizer_config.json", **changes)
        yield f"tokenizer_config.json: {name}", lambda folder=folder: use(folder)
    for name, changes in {
        "lengths of text": {"max_length": "long"},
        "ids of lists": {"eos_token_id": [["x"]]},
        "a temperature of text": {"temperature": "hot", "do_sample": True},
        "a cache that is none": {"cache_implementation": "cloud"},
    }.items():
        folder = copied(model, f"generation settings {name}")
        edited(folder / "generation_config.json", **changes)
        yield f"generation_config.json: {name}", lambda folder=folder: use(folder)


# --- GGUF ------------------------------------------------------------------------------------


def gguf_cases(folder: Path, tokenizer) -> Iterator[Case]:
    whole = write_gguf(
        folder / "whole.gguf",
        make_model(
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        tokenizer,
    ).read_bytes()

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    def head(tensors: int, fields: int) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)

    def array(kind: int, count: int) -> bytes:
        return text("a") + struct.pack("<IIQ", 9, kind, count)

    tensor = text("t") + struct.pack("<I", 1)
    contents = {
        "2^60 fields": head(0, 2**60),
        "2^60 tensors": head(2**60, 0),
        "an array of 2^60 numbers": head(0, 1) + array(4, 2**60) + b"\0" * 64,
        "an array of 2^60 words": head(0, 1) + array(8, 2**60),
        "an array of 2^60 arrays": head(0, 1) + array(9, 2**60),
        "a word of 2^60 letters": head(0, 1) + struct.pack("<Q", 2**60),
        "a word of 2^64 - 1 letters": head(0, 1) + struct.pack("<Q", 2**64 - 1),
        "a tensor of 2^31 dimensions": head(1, 0) + text("t") + struct.pack("<I", 2**31),
        "a tensor of 2^60 numbers": head(1, 0) + tensor + struct.pack("<QIQ", 2**60, 0, 0),
        "a tensor at 2^63": head(1, 0) + tensor + struct.pack("<QIQ", 1, 0, 2**63),
        "a type that is none": head(1, 0) + tensor + struct.pack("<QIQ", 1, 999, 0),
        "arrays in arrays": head(0, 1)
        + text("a")
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 9, 1) * 100_000,
        "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 1),
        "nothing": b"",
        "noise": np.random.default_rng(0).bytes(100_000),
    }
    for name, content in contents.items():
        path = folder / f"{name.replace(' ', '-').replace('^', '')}.gguf"
        path.write_bytes(content)
        yield f"GGUF: {name}", lambda path=path: load_model(str(path))
    path = folder / "hole.gguf"
    path.write_bytes(head(0, 1) + array(4, 2**38))
    os.truncate(path, TERABYTE)
    yield "GGUF: a terabyte of zeros in an array", lambda path=path: load_model(str(path))
    path = folder / "long.gguf"
    path.write_bytes(whole)
    os.truncate(path, TERABYTE)
    yield "GGUF: a terabyte of nothing at the end", lambda path=path: load_model(str(path))
    outside = folder / "linked.gguf"
    outside.symlink_to(folder / "no-such.gguf")
    yield "GGUF: a link to nothing", lambda: load_model(str(outside))


# --- texts and compression.json --------------------------------------------------------------


def make_bombs(folder: Path) -> None:
    """Small files that decompress to gigabytes; another process makes them, for its memory peak."""
    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return
    rows = pyarrow.table({"text": pyarrow.array(["x" * 1_000_000] * 250)})
    with pyarrow.parquet.ParquetWriter(
        folder / "bomb.parquet", rows.schema, compression="zstd"
    ) as writer:
        for _ in range(16):
            writer.write_table(rows)
    del rows
    one = pyarrow.table({"text": ["\0" * 20_000_000] * 30})
    pyarrow.parquet.write_table(
        one, folder / "one.parquet", compression="zstd", use_dictionary=False
    )
    os._exit(0)


def text_cases(folder: Path) -> Iterator[Case]:
    def text(name: str, content: bytes) -> Callable[[], object]:
        path = folder / name
        path.write_bytes(content)
        return lambda: read_corpus(str(path))

    yield "text: UTF-16 without a mark", text("utf16.txt", "one fish".encode("utf-16-le"))
    yield "text: half a pair in UTF-16", text("pair.txt", b"\xff\xfe\x00\xd8a\x00")
    yield "text: Latin-1", text("latin.txt", "fünf Fische".encode("latin-1"))
    yield "text: UTF-8 in the middle of a letter", text("half.txt", "ü".encode()[:1])
    yield "text: nulls", text("null.txt", b"a\0b")
    yield "text: nothing", text("empty.txt", b"")
    yield "text: a mark of byte order alone", text("bom.txt", b"\xef\xbb\xbf \n")
    yield "text: surrogates", text("surrogates.txt", "\ud800".encode("utf-8", "surrogatepass"))
    sparse = folder / "sparse.txt"
    sparse.touch()
    os.truncate(sparse, TERABYTE)
    yield "text: a terabyte of nothing", lambda: read_corpus(str(sparse))
    yield "text: a device without end", lambda: read_corpus("/dev/zero")
    yield "text: a folder", lambda: read_corpus(str(folder))
    yield "jsonl: no JSON", text("no.jsonl", b"{")
    yield "jsonl: nested without end", text("deep.jsonl", b'{"text":' * 100_000)
    yield "jsonl: a number of a million digits", text("digits.jsonl", b"9" * 1_000_000)
    yield "jsonl: numbers for text", text("numbers.jsonl", b'{"text": 7}\n')
    yield "jsonl: half a surrogate pair", text("lone.jsonl", b'{"text": "\\ud800"}\n')
    yield "jsonl: another encoding", text("utf16.jsonl", '{"text": "x"}'.encode("utf-16-le"))
    line = folder / "line.jsonl"
    line.write_bytes(b'{"text": "')
    os.truncate(line, TERABYTE)
    yield "jsonl: a line of a terabyte", lambda: read_corpus(str(line))
    yield "parquet: no Parquet", text("no.parquet", b"PAR1" + b"\xff" * 200 + b"PAR1")
    yield (
        "parquet: a footer of gigabytes",
        text("footer.parquet", b"PAR1" + b"\0" * 100 + struct.pack("<I", 2**31 - 1) + b"PAR1"),
    )
    yield "parquet: 4 GB of one word", lambda: harmless(read_corpus(str(folder / "bomb.parquet")))
    yield (
        "parquet: a row group of 600 MB",
        lambda: harmless(read_corpus(str(folder / "one.parquet"))),
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xff"]}), folder / "bytes.parquet")
    yield "parquet: bytes for text", lambda: read_corpus(str(folder / "bytes.parquet"))


def harmless(_: object) -> None:
    """Marks a case that may be read, as it was within the limits."""
    raise TransActError("harmless")


def compression_cases(folder: Path) -> Iterator[Case]:
    def stored(name: str, content: bytes) -> Callable[[], object]:
        path = folder / name
        path.write_bytes(content)
        return lambda: read_compression(path)

    yield "compression.json: nested without end", stored("deep.json", b'{"plan":' * 100_000)
    yield "compression.json: a million digits", stored("digits.json", b'{"seed": ' + b"9" * 10**6)
    yield "compression.json: no encoding", stored("bytes.json", b"\xff\xfe")
    yield "compression.json: nothing", stored("empty.json", b"")
    huge = folder / "huge.json"
    huge.touch()
    os.truncate(huge, TERABYTE)
    yield "compression.json: a terabyte", lambda: read_compression(huge)
    yield "compression.json: a device without end", lambda: read_compression(Path("/dev/zero"))
    yield "compression.json: a folder", lambda: read_compression(folder)
    yield "compression.json: a name without end", lambda: read_compression(Path("x" * 5000))


# --- running ---------------------------------------------------------------------------------


def tried(case: Callable[[], object]) -> tuple[str, bool]:
    """Runs a case; returns its message and whether that is a refusal in one line."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        case()
        return "accepted without an error", False
    except TransActError as error:
        return str(error), "\n" not in str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300], False
    finally:
        signal.alarm(0)


def peak_mb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["TRANSACT_CACHE"] = str(folder / "cache")
        (folder / "other").mkdir()
        make_bombs(folder / "other")
        model = folder / "model"
        tokenizer = make_tokenizer()
        make_model(num_key_value_heads=3).save_pretrained(model)
        tokenizer.save_pretrained(model)
        cases = [
            *configuration_cases(model),
            *weight_cases(model),
            *tokenizer_cases(model),
            *gguf_cases(folder / "other", tokenizer),
            *text_cases(folder / "other"),
            *compression_cases(folder / "other"),
        ]
        load_model(str(model))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present use
        before = peak_mb()
        wanted = sys.argv[1] if len(sys.argv) > 1 else ""
        right = True
        for name, case in cases:
            if wanted not in name:
                continue
            began = time.monotonic()
            said, good = tried(case)
            right = right and good
            seconds = round(time.monotonic() - began, 2)
            print(
                json.dumps(
                    {
                        "case": name,
                        "good": good,
                        "said": said.replace(place, ""),
                        "seconds": seconds,
                    }
                ),
                flush=True,
            )
        print(f"At most {peak_mb() - before} MB beside {before} MB of imports", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
