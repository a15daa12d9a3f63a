"""A GGUF file, looked through and converted to a checkpoint folder.

What transformers' reader would drop without a word, or put defaults of other models in the place
of, is refused before anything is read.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    ReaderTensor,
    get_tensor_name_map,
)
from transformers import AutoTokenizer, LlamaForCausalLM

from transact_core.base.errors import TransActError, first_line
from transact_core.base.files import staged_folder
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import (
    ATTENTION,
    Inspection,
    inspect_folder,
    require_tensors,
)
from transact_core.models.devices import MemoryEstimate, available_memory, dtype_name

REQUIRED_METADATA = (
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
)
"""llama.cpp demands these too; transformers would put defaults of other models in their place."""
MOST_ITEMS = 10_000_000
"""In an array of a GGUF file's metadata; vocabularies have some hundred thousand."""


def inspect_gguf(path: Path) -> Inspection:
    """Architecture of a GGUF file, after checking that it is a whole dense LLaMA model.

    Raises:
        TransActError: another architecture, a damaged file, or rotary scaling, which
            transformers' GGUF reader drops without a word.
    """
    reader = _read_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str, default: object = None) -> object:
        stored = reader.fields.get(key)
        return default if stored is None else stored.contents()

    named = value("general.architecture", "unknown")
    if named != "llama":
        raise TransActError(f"{path} holds a {named} model; only llama GGUF files can be pruned.")
    if value("llama.expert_count", 0) or any("_exps." in name for name in tensors):
        raise TransActError(f"{path} holds a mixture of experts; only dense models can be pruned.")
    scaling = value("llama.rope.scaling.type", "none")
    factors = tensors.get("rope_freqs.weight")
    if scaling != "none" or (factors is not None and not (factors.data == 1).all()):
        raise TransActError(
            f"{path} scales its rotary frequencies, which is lost when transformers reads a GGUF "
            "file; use the model's safetensors checkpoint."
        )
    for key in REQUIRED_METADATA:
        if not value(key):
            raise TransActError(f"{path} does not say {key}, which a llama model needs.")
    try:
        heads = int(value("llama.attention.head_count"))
        hidden = int(value("llama.embedding_length"))
        architecture = Architecture(
            hidden_size=hidden,
            intermediate_size=int(value("llama.feed_forward_length")),
            num_hidden_layers=int(value("llama.block_count")),
            num_attention_heads=heads,
            num_key_value_heads=int(value("llama.attention.head_count_kv", heads)),
            head_dim=int(value("llama.rope.dimension_count", hidden // heads)),
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
        )
    except (TypeError, ValueError, KeyError, IndexError):
        raise TransActError(f"{path} lacks what a llama model needs; it may be damaged.") from None
    leftovers = require_tensors(
        path, architecture, _huggingface_shapes(tensors, architecture), "its metadata"
    )
    notices = (leftovers,) if leftovers else ()
    return Inspection(architecture, [path], _gguf_dtype(reader), notices)


def _huggingface_shapes(
    tensors: Mapping[str, ReaderTensor], architecture: Architecture
) -> dict[str, tuple[int, ...]]:
    """Shapes by transformers' names of the tensors; those that have none keep their own."""
    # A damaged file may claim any number of layers; no more are looked up than it has tensors.
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, min(architecture.num_hidden_layers, len(tensors)))
    known = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): name
        for name, _ in islice(architecture.tensors(), len(tensors))
    }
    return {
        known.get(name, name): tuple(int(size) for size in reversed(tensor.shape))
        for name, tensor in tensors.items()
        if name != "rope_freqs.weight"
    }


class _BoundedReader(GGUFReader):
    """The reader of the gguf package, which walks past the end of a file that claims too much."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if int(count) < 0 or not 0 <= offset <= end <= len(self.data):
            raise ValueError("something is said to lie past the end of the file")
        return super()._get(offset, dtype, count, *rest, **named)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > MOST_ITEMS:
            raise ValueError("an array is longer than any vocabulary")
        return super()._get_field_parts(orig_offs, raw_type)


def require_plausible_size(path: Path, device: torch.device) -> None:
    """Refuses a file that cannot fit, before it is read to be fingerprinted."""
    # Its weights are float32 on the way, which is no less than any GGUF type takes.
    size = path.stat().st_size
    MemoryEstimate(needed=size, available=available_memory(), device=str(device)).verdict()


def _read_gguf(path: Path) -> GGUFReader:
    try:
        reader = _BoundedReader(path)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except Exception:
        raise TransActError(f"{path} is truncated, corrupt or not a GGUF file.") from None
    if end > path.stat().st_size:
        raise TransActError(f"{path} is truncated: its tensors end past the end of the file.")
    return reader


def inspect_converted(folder: Path, path: Path) -> Inspection | None:
    """What was kept of a GGUF file; what is damaged is removed, to be converted again."""
    if not folder.is_dir():
        return None
    try:
        return replace(inspect_folder(folder), files=[path])
    except TransActError:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def convert_gguf(path: Path, stored: torch.dtype, folder: Path) -> None:
    """Makes a checkpoint folder of a file that has been looked through, whole or not at all.

    Raises:
        TransActError: transformers cannot read it, or `stored` cannot hold its weights.
    """
    try:
        model = LlamaForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, attn_implementation=ATTENTION
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise TransActError(f"transformers could not read {path}: {first_line(error)}.") from None
    # transformers marks the model as quantised though its weights are dense, and then refuses to
    # save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model = model.to(stored)
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise TransActError(f"{path} holds weights that {dtype_name(stored)} cannot represent.")
    try:
        with staged_folder(folder) as staging:
            model.save_pretrained(staging, max_shard_size="1000GB")
            tokenizer.save_pretrained(staging)
    except TransActError:
        # Another process that converts the same file may have been quicker.
        if not folder.is_dir():
            raise


def _gguf_dtype(reader: GGUFReader) -> torch.dtype:
    types = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    if types == {GGMLQuantizationType.F32}:
        return torch.float32
    if types == {GGMLQuantizationType.BF16}:
        return torch.bfloat16
    return torch.float16
