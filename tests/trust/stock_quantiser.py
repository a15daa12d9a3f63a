"""What llama.cpp's own quantiser makes of small models, recorded as digests.

    make stock-llama-cpp && python -m tests.trust.stock_quantiser

writes `stored/stock-quantiser.json` anew, from a build of llama.cpp that is not the app's.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from transformers import LlamaConfig

from transact_core.export.gguf import (
    FilePlan,
    ImatrixSource,
    describe_model,
    plan_file,
    write_file,
)
from transact_core.export.gguf_types import QUANTIZATIONS
from transact_core.forward.imatrix import Imatrix
from transact_core.models.architecture import Architecture

HERE = Path(__file__).parent
STORED = HERE / "stored" / "stock-quantiser.json"
SIZES = {
    "untied": {"num_key_value_heads": 2},
    "tied, MLP a multiple of 32": {"intermediate_size": 288, "tie_word_embeddings": True},
    "tied, MLP no multiple of 32": {"intermediate_size": 200, "tie_word_embeddings": True},
    "four queries a group": {"num_key_value_heads": 1},
}
LAYERS = {"bytes": 2, "types": 17}
"""Few layers where all weights are written; enough for every rule by layer where types alone are."""


def config_of(size: str, layers: int) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 64,
            **SIZES[size],
        }
    )


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that are the same on every machine, with some far larger than the others."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy((values**3 * 0.02).astype(np.float32))


def imatrix_of(architecture: Architecture) -> Imatrix:
    return {
        name: numbers(f"imatrix of {name}", shape[1:]).square().numpy() + np.float32(1e-3)
        for name, shape in architecture.tensors()
        if name.startswith("model.layers.") and len(shape) == 2
    }


def planned(size: str, layers: int, chosen: str, weighted: bool) -> FilePlan:
    config = config_of(size, layers)
    description = describe_model(config, Architecture.from_config(config), (), size)
    return plan_file(description, chosen, ImatrixSource("numbers", 1) if weighted else None)


def write(path: Path, size: str, layers: int, chosen: str, weighted: bool) -> FilePlan:
    plan = planned(size, layers, chosen, weighted)
    architecture = Architecture.from_config(config_of(size, layers))
    shapes = dict(architecture.tensors())
    imatrix = imatrix_of(architecture) if weighted else None
    write_file(
        path, plan, architecture, lambda name: numbers(name, shapes[name]), imatrix, threads=1
    )
    return plan


def cases() -> list[tuple[str, str, bool]]:
    return [
        (size, name, weighted)
        for size in SIZES
        for name, chosen in QUANTIZATIONS.items()
        for weighted in ((False,) if chosen.is_float else (False, True))
    ]


def key(size: str, chosen: str, weighted: bool) -> str:
    return f"{size}: {chosen}{' with imatrix' if weighted else ''}"


def digest_of_types(types: dict[str, str]) -> str:
    counts = Counter(types.values())
    listed = json.dumps(sorted(types.items()))
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{summary}: {hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def digest_of_bytes(path: Path) -> str:
    digest = hashlib.sha256()
    for tensor in sorted(GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.tensor_type.name} ".encode())
        digest.update(tensor.data.tobytes())
    return digest.hexdigest()[:32]


def by_stock(place: Path) -> dict[str, dict[str, str]]:
    """The digests of what the stock quantiser writes, for each case."""
    requests = {}
    for size, chosen, weighted in cases():
        for what, layers in LAYERS.items():
            source = place / f"{size}-{layers}.gguf"
            if not source.exists():
                write(source, size, layers, "F32", False)
            plan = planned(size, layers, chosen, weighted)
            names = {tensor.source: tensor.name for tensor in plan.tensors}
            imatrix = imatrix_of(Architecture.from_config(config_of(size, layers)))
            requests[f"{what}/{key(size, chosen, weighted)}"] = {
                "read": str(source),
                "write": str(place / f"{len(requests)}.gguf"),
                "file_type": int(plan.quantization.file_type),
                "imatrix": {names[name]: values.tolist() for name, values in imatrix.items()}
                if weighted
                else None,
            }
    (place / "asked.json").write_text(json.dumps(requests))
    folder = os.environ.get("STOCK_LLAMA_CPP") or Path(sys.prefix) / "stock-llama-cpp"
    subprocess.run(
        [
            sys.executable,
            HERE / "runtimes" / "in_stock_quantizer.py",
            place / "asked.json",
            place / "answered.json",
        ],
        env=os.environ | {"STOCK_LLAMA_CPP": str(folder)},
        check=True,
        stderr=subprocess.DEVNULL,
    )
    answers = json.loads((place / "answered.json").read_text())
    found: dict[str, dict[str, str]] = {what: {} for what in LAYERS}
    for name, request in requests.items():
        if answers[name] != {"status": 0}:
            raise SystemExit(f"{name}: {answers[name]}")
        what, _, case = name.partition("/")
        path = Path(request["write"])
        if what == "bytes":
            found[what][case] = digest_of_bytes(path)
        else:
            types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
            found[what][case] = digest_of_types(types)
        path.unlink()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps(by_stock(Path(folder)), indent=1) + "\n")
