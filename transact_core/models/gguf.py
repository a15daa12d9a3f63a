"""A GGUF file, inspected and converted to a checkpoint folder.

transformers' reader silently drops what it does not know, and fills in defaults of other models.
What it drops is read here, or refused before any weight is read.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    ReaderField,
    ReaderTensor,
    get_tensor_name_map,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transact_core.base.errors import INTERRUPTIONS, TransActError, first_line
from transact_core.base.files import cache_folder, read_text, staged_folder
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import (
    ATTENTION,
    Inspection,
    inspect_folder,
    require_tensors,
)
from transact_core.models.devices import MemoryEstimate, available_memory, dtype_name
from transact_core.models.families.table import FAMILIES
from transact_core.models.gguf_reader import read_gguf, used_by_transformers
from transact_core.models.gguf_tokenizer import (
    pre_tokenizer_notice,
    tokenizer_from_metadata,
    write_sentencepiece_model,
)
from transact_core.models.stock_class import written_values

REQUIRED_METADATA = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
"""Keys under the architecture's name that llama.cpp demands; without them transformers would take
defaults of other models."""
REQUIRED_VOCABULARY = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
"""Keys that it demands of every model."""
VOCABULARY_METADATA = {
    "gpt2": ("tokenizer.ggml.merges",),
    "llama": ("tokenizer.ggml.scores",),
}
"""Further keys that each kind of tokenizer needs, by the value of `tokenizer.ggml.model`."""
CONVERSION = 4
"""Version of what `convert_gguf` makes of a file, raised whenever that changes. Folders that an
older version made are not used."""
LICENCE_PARTS = ("", ".name", ".link")
"""Endings of the keys `general.license` of a GGUF file's metadata."""
NOTICES_FILE = "transact_notices.json"
"""File of a converted folder with the notices of its inspection, a list of sentences."""
ATTENTION_BIASES = tuple(f"attn_{part}.bias" for part in ("q", "k", "v", "output"))
MLP_BIASES = tuple(f"ffn_{part}.bias" for part in ("gate", "up", "down"))
EXPECTED_PER_STORED = 2
"""A biased layer has 16 tensors of which 9 are weights, and missing biases count as zeros: a whole
file has fewer than twice as many expected tensors as stored ones."""


def inspect_gguf(path: Path) -> Inspection:
    """Architecture of a GGUF file, after checking that it is a whole dense model of a family that
    transformers reads from GGUF files.

    Raises:
        TransActError: another architecture, one part of a split file, a damaged file, or something
            that transformers' GGUF reader drops and that changes what the model computes.
    """
    reader = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str, default: object = None) -> object:
        stored = reader.fields.get(key)
        return default if stored is None else stored.contents()

    named = value("general.architecture", "unknown")

    def own(key: str, default: object = None) -> object:
        return value(f"{named}.{key}", default)

    if own("expert_count", 0) or any("_exps." in name for name in tensors):
        raise TransActError(f"{path} holds a mixture of experts; only dense models can be pruned.")
    families = {family.gguf: family for family in FAMILIES.values() if family.gguf}
    if named not in families:
        recurrent = any(key.startswith((f"{named}.ssm.", f"{named}.wkv.")) for key in reader.fields)
        kind = ", which has recurrent layers" if recurrent else ""
        raise TransActError(
            f"{path} holds a {named} model{kind}; only the GGUF files of {', '.join(families)} "
            "models can be pruned, so use the checkpoint folder of another family."
        )
    family = families[named]
    # llama.cpp scales linearly where a factor stands without a type.
    factor = own("rope.scaling.factor") or own("rope.scale_linear") or 1.0
    scaling = own("rope.scaling.type", "none" if factor == 1.0 else "linear")
    frequencies = tensors.get("rope_freqs.weight")
    if scaling != "none" or (frequencies is not None and not (frequencies.data == 1).all()):
        raise TransActError(
            f"{path} scales its rotary frequencies, which is lost when transformers reads a GGUF "
            "file; use the model's safetensors checkpoint."
        )
    kind = value("tokenizer.ggml.model")
    required = [f"{named}.{key}" for key in REQUIRED_METADATA]
    for key in (*required, *REQUIRED_VOCABULARY, *VOCABULARY_METADATA.get(kind, ())):
        if not value(key):
            raise TransActError(f"{path} does not say {key}, which a {named} model needs.")
    if kind not in VOCABULARY_METADATA:
        raise TransActError(
            f"{path} holds a tokenizer of the kind {kind}; only gpt2 and llama, that is byte-level "
            "BPE and SentencePiece, can be read."
        )
    try:
        heads = int(own("attention.head_count"))
        hidden = int(own("embedding_length"))
        rotated = own("rope.dimension_count")
        head_dim = int(own("attention.key_length") or rotated or hidden // heads)
        biased = {
            "attention_bias": any(name.endswith(ATTENTION_BIASES) for name in tensors),
            "mlp_bias": any(name.endswith(MLP_BIASES) for name in tensors),
        }
        architecture = Architecture(
            hidden_size=hidden,
            intermediate_size=int(own("feed_forward_length")),
            num_hidden_layers=int(own("block_count")),
            num_attention_heads=heads,
            num_key_value_heads=int(own("attention.head_count_kv", heads)),
            head_dim=head_dim,
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in tensors,
            model_type=family.model_type,
            **{name: has and name in family.bias_fields for name, has in biased.items()},
        )
    except (TypeError, ValueError, KeyError, IndexError):
        raise TransActError(
            f"{path} lacks what a {named} model needs; it may be damaged."
        ) from None
    if rotated not in (None, head_dim):
        raise TransActError(
            f"{path} rotates {rotated} of the {head_dim} dimensions of each head; only models that "
            "rotate all of them can be pruned."
        )
    if family.divides_hidden_size and hidden % heads:
        # The reader knows no names of MistralForCausalLM's tensors, which could hold such a model.
        raise TransActError(
            f"{path} holds {heads} attention heads, which do not divide its hidden_size of "
            f"{hidden}; transformers cannot read such a GGUF file, so use the model's checkpoint "
            "folder."
        )
    left_over = require_tensors(
        path, architecture, _huggingface_shapes(tensors, architecture), "its metadata"
    )
    if left_over:
        # llama.cpp refuses such a file too.
        raise TransActError(
            f"{left_over.removesuffix('.')}; a model without them would not be the one in the file."
        )
    notice = pre_tokenizer_notice(path, _tokenizer_metadata(reader, without_arrays=True))
    return Inspection(architecture, [path], _gguf_dtype(reader), (notice,) if notice else ())


def _tokenizer_metadata(reader: GGUFReader, without_arrays: bool = False) -> dict[str, Any]:
    """The file's metadata about its tokenizer."""
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.")
        and not (without_arrays and field.types[:1] == [GGUFValueType.ARRAY])
    }


def _huggingface_shapes(
    tensors: Mapping[str, ReaderTensor], architecture: Architecture
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by transformers' names, or by their own where those have none.

    A bias that is not stored beside others of its module is zero, so it counts as there, unless
    the family always has it. Rotary
    frequencies, which follow from the metadata, are left out.
    """
    # A damaged file may claim any number of layers; not many more are looked up than it can have.
    layers = min(architecture.num_hidden_layers, len(tensors))
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.family.gguf)
    names = get_tensor_name_map(kind, layers)
    expected = dict(islice(architecture.tensors(), EXPECTED_PER_STORED * len(tensors)))
    known = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in expected}
    shapes = {
        known.get(name, name): tuple(int(size) for size in reversed(tensor.shape))
        for name, tensor in tensors.items()
        if not name.startswith("rope_freqs") and ".attn_rot_embd" not in name
    }
    required = architecture.family.always_biased
    zeros = {
        name: shape
        for name, shape in expected.items()
        if name.endswith(".bias") and name.split(".")[-2] not in required
    }
    return zeros | shapes


def require_plausible_size(path: Path) -> None:
    """Refuses a file that cannot fit into memory, before all of it is read for its SHA-256."""
    # Its weights are converted to float32, which takes no less than any GGUF type.
    size = path.stat().st_size
    MemoryEstimate(needed=size, available=available_memory(), device="cpu").verdict()


def converted_folder(fingerprint: str) -> Path:
    """Where the checkpoint folder made of the GGUF file with this SHA-256 is kept.

    Folders that an older version of the conversion made of the same file are removed.
    """
    models = cache_folder() / "models"
    folder = models / f"{fingerprint}-{CONVERSION}"
    for older in models.glob(f"{fingerprint}*"):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)
    return folder


def inspect_converted(folder: Path, path: Path) -> Inspection | None:
    """What a converted folder holds; None, and the folder removed, where it is damaged."""
    if not folder.is_dir():
        return None
    try:
        notices = tuple(json.loads(read_text(folder / NOTICES_FILE)))
        return replace(inspect_folder(folder), files=[path], notices=notices)
    except (TransActError, OSError, ValueError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def convert_gguf(path: Path, found: Inspection, folder: Path) -> None:
    """Makes a checkpoint folder of a file that was inspected, whole or not at all.

    Raises:
        TransActError: transformers cannot read the file, or the dtype cannot hold its weights.
    """
    reader = read_gguf(path)
    tokenizer, metadata = _read_tokenizer(path, reader)
    try:
        model_class = found.architecture.family.model_class
        with used_by_transformers():
            config = model_class.config_class.from_pretrained(path.parent, gguf_file=path.name)
            # Of a file that calls itself "mistral" transformers makes another type than its own
            # classes.
            config.model_type = found.architecture.model_type
            # It knows of no biases nor head_dim, and takes its vocabulary's size from the
            # tokenizer.
            for name, value in written_values(found.architecture).items():
                setattr(config, name, value)
            model, loading = model_class.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                attn_implementation=ATTENTION,
                output_loading_info=True,
            )
    except Exception as error:
        raise TransActError(f"transformers could not read {path}: {first_line(error)}.") from None
    for name in loading["missing_keys"]:
        if not name.endswith(".bias"):
            raise TransActError(f"transformers did not read the tensor {name} of {path}.")
        torch.nn.init.zeros_(model.get_parameter(name))
    # transformers marks the model as quantised though its weights are dense, and then refuses to
    # save it.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    _set_special_token_ids(model, reader.fields)
    model = model.to(found.dtype)
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise TransActError(
            f"{path} holds weights that {dtype_name(found.dtype)} cannot represent."
        )
    try:
        with staged_folder(folder) as staging:
            model.save_pretrained(staging, max_shard_size="1000GB")
            tokenizer.save_pretrained(staging)
            if metadata["tokenizer.ggml.model"] == "llama":
                write_sentencepiece_model(metadata, staging / "tokenizer.model")
            (staging / NOTICES_FILE).write_text(json.dumps(found.notices))
            _write_licence(staging, reader.fields)
    except TransActError:
        # Another process that converts the same file may have been faster.
        if not folder.is_dir():
            raise


@dataclass(frozen=True)
class GgufText:
    """What a GGUF file of any architecture needs to be fed with text."""

    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    context_length: int | None
    """Tokens that the model was trained to see at once; None where the file does not say."""
    notices: tuple[str, ...] = ()


def read_gguf_text(path: Path) -> GgufText:
    """The tokenizer of a GGUF file that another runtime runs, with llama.cpp's token ids.

    Raises:
        TransActError: the file is missing, damaged, or has a tokenizer of another kind.
    """
    if not path.is_file():
        raise TransActError(f"There is no GGUF file at {path}.")
    reader = read_gguf(path)
    fields = reader.fields
    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if key not in fields:
            raise TransActError(f"{path} does not say {key}, which llama.cpp needs.")
    kind = fields["tokenizer.ggml.model"].contents()
    if kind not in VOCABULARY_METADATA:
        raise TransActError(
            f"{path} holds a tokenizer of the kind {kind}; only gpt2 and llama, that is byte-level "
            "BPE and SentencePiece, can be read."
        )
    tokenizer, metadata = _read_tokenizer(path, reader)
    length = fields.get(f"{fields['general.architecture'].contents()}.context_length")
    notice = pre_tokenizer_notice(path, metadata)
    return GgufText(
        tokenizer,
        len(metadata["tokenizer.ggml.tokens"]),
        None if length is None else int(length.contents()),
        (notice,) if notice else (),
    )


def _read_tokenizer(
    path: Path, reader: GGUFReader
) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The tokenizer that a file describes, and the metadata that it was made from."""
    try:
        metadata = _tokenizer_metadata(reader)
        return tokenizer_from_metadata(metadata), metadata
    except INTERRUPTIONS:
        raise
    except BaseException as error:  # the tokenizers library panics with one that is no Exception
        raise TransActError(
            f"The tokenizer in {path} cannot be read ({first_line(error)}); it may be damaged."
        ) from None


def _set_special_token_ids(model: PreTrainedModel, fields: Mapping[str, ReaderField]) -> None:
    """Gives the configurations the ids that the file names; the reader leaves LLaMA 1's there.

    Generation ends at each of the tokens at which llama.cpp ends it.
    """

    def token_id(name: str) -> int | None:
        stored = fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if stored is None else int(stored.contents())

    ends = [token_id(name) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    for config in (model.config, model.generation_config):
        config.bos_token_id = token_id("bos")
        config.pad_token_id = token_id("padding")
        config.eos_token_id = ends[0] if ends else None
    if len(ends) > 1:
        model.generation_config.eos_token_id = ends


def _write_licence(folder: Path, fields: Mapping[str, ReaderField]) -> None:
    """Writes the licence that a GGUF file names as the front matter of a model card."""
    keys = {f"general.license{part}": f"license{part.replace('.', '_')}" for part in LICENCE_PARTS}
    stated = {name: fields[key].contents() for key, name in keys.items() if key in fields}
    lines = [f"{name}: {json.dumps(str(value))}" for name, value in stated.items()]
    if lines:
        (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8")


def _gguf_dtype(reader: GGUFReader) -> torch.dtype:
    """The dtype that keeps the file's matrices: their own, or float16 for quantised ones."""
    types = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    if types == {GGMLQuantizationType.F32}:
        return torch.float32
    if types == {GGMLQuantizationType.BF16}:
        return torch.bfloat16
    return torch.float16
