"""A checkpoint folder, looked through before it is loaded.

Configuration, tensor names and shapes are checked on the headers alone. Whatever cannot become a
dense `LlamaForCausalLM` is refused in one sentence while no weight has been read. Weights come from
safetensors only; nothing is unpickled, no remote code is run.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from transact_core.base.errors import INTERRUPTIONS, TransActError, first_line
from transact_core.base.files import MAX_NAME_BYTES, MAX_TEXT_BYTES, read_text
from transact_core.models.architecture import Architecture

disable_progress_bar()  # ours is reported through the callback, once
set_verbosity_error()  # what is wrong with a model is said here, in one sentence

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Of the files in a checkpoint folder that transformers or this package may read."""
QUANTISED_ADVICE = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
}
QUANTISED_TENSORS = (".qweight", ".qzeros", ".absmax", ".quant_state.bitsandbytes__nf4")
ATTENTION = "sdpa"
"""Named wherever a model is loaded: a config.json may name code on the hub that would be run."""
MOST_GROWTH = 64
"""How many characters a tokenizer may make of one before it splits the text."""
MOST_LABELS = 100_000
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Inspection:
    """What a source turned out to hold, before any of its weights is read."""

    architecture: Architecture
    files: list[Path]
    dtype: torch.dtype
    """Of the stored weights; float16 where they are quantised in a GGUF file."""
    leftovers: str | None = None
    """A notice about tensors that no `LlamaForCausalLM` has."""


def require_tensors(
    where: Path,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    described_by: str,
) -> str | None:
    """Refuses weights that are not those of the architecture; a notice about what is left over.

    Raises:
        TransActError: a tensor is missing or of another shape than `described_by` makes it.
    """
    expected = set()
    for name, shape in architecture.tensors():
        if name not in shapes:
            raise TransActError(f"The weights in {where} lack the tensor {name}.")
        if shapes[name] != shape:
            raise TransActError(
                f"The tensor {name} in {where} has shape {list(shapes[name])}, "
                f"where {described_by} makes it {list(shape)}."
            )
        expected.add(name)
    # Old checkpoints carry the rotary frequencies, and some a copy of the tied LM head.
    left = sorted(
        name
        for name in shapes.keys() - expected
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    )
    if not left:
        return None
    more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
    return (
        f"{where} holds tensors that a LlamaForCausalLM of its configuration has not, and they are "
        f"left out: {left[0]}{more}."
    )


def inspect_folder(folder: Path) -> Inspection:
    """Architecture and weight files of a checkpoint folder, after checking each tensor's shape.

    Raises:
        TransActError: anything that keeps the folder from being a dense `LlamaForCausalLM`.
    """
    _require_own_files(folder)
    raw = _read_config(folder)
    _require_llama(folder, raw)
    try:
        if (labels := raw.get("num_labels", 0)) > MOST_LABELS:
            raise ValueError(f"num_labels is {labels}")
        for name in ("output_attentions", "output_hidden_states"):
            if raw.get(name):
                raise ValueError(f"{name} is on, which keeps every layer's in memory")
        if not raw.get("return_dict", True):
            raise ValueError("return_dict is off")
        config = LlamaConfig.from_dict(raw)
        architecture = Architecture.from_config(config)
        rotary = (config.rope_parameters or {}).get("rope_type", "default")
        if rotary != "default" and rotary not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"the rope_type {rotary!r} is not one that transformers knows")
        if config.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}")
        if not 0 <= config.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps is {config.rms_norm_eps}")
        theta = (config.rope_parameters or {}).get("rope_theta", 1.0)
        if not 0 < theta < math.inf:
            raise ValueError(f"rope_theta is {theta}")
    except Exception as error:
        reason = _last_line(error)
        raise TransActError(
            f"{folder / 'config.json'} is not a valid configuration: {reason}."
        ) from None
    files = _safetensors_files(folder)
    stored = _stored_tensors(files)
    if any(name.endswith(QUANTISED_TENSORS) for name in stored):
        raise TransActError(_quantised_refusal(folder, "packed integers, as GPTQ and AWQ keep"))
    leftovers = require_tensors(
        folder, architecture, {name: shape for name, (shape, _) in stored.items()}, "config.json"
    )
    return Inspection(architecture, files, _stored_dtype(folder, architecture, stored), leftovers)


def _stored_dtype(
    folder: Path, architecture: Architecture, stored: dict[str, tuple[tuple[int, ...], str]]
) -> torch.dtype:
    """The dtype that holds most of the parameters; all of them must be floats."""
    parameters: Counter[str] = Counter()
    for name, shape in architecture.tensors():
        dtype = stored[name][1]
        if dtype not in STORED_DTYPES:
            raise TransActError(
                f"{folder} stores {name} as {dtype}; only float32, float16 and bfloat16 "
                "checkpoints can be pruned."
            )
        parameters[dtype] += math.prod(shape)
    return STORED_DTYPES[max(parameters, key=parameters.get)]


def _require_own_files(folder: Path) -> None:
    """Refuses links that lead out of the folder, and what is absurdly large for its kind.

    What is read here may be written into an output folder, so a link could carry any file of this
    machine into it. The hub's cache, whose files are links into its own store, is as it should be.
    """
    home = folder.resolve()
    in_hub_cache = home.parent.name == "snapshots" and home.parent.parent.name.startswith(
        "models--"
    )
    roots = [home, home.parent.parent / "blobs"] if in_hub_cache else [home]
    for path in sorted(folder.iterdir()):
        if path.suffix not in READ_SUFFIXES:
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise TransActError(f"{path} is a link that leads nowhere; remove it.") from None
        if not any(target.is_relative_to(root) for root in roots):
            raise TransActError(
                f"{path} is a link out of its folder, to {target}; put the file itself there."
            )
        too_large = path.suffix != ".safetensors" and target.stat().st_size > MAX_TEXT_BYTES
        if not target.is_file() or too_large:
            raise TransActError(f"{path} is no file, or far too large for its kind; remove it.")


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if any((folder / f"adapter_{name}").is_file() for name in ("config.json", "model.safetensors")):
        raise TransActError(
            f"{folder} holds a LoRA adapter, not a model; merge it into its base model first "
            "(peft's merge_and_unload) and name the merged folder."
        )
    if not path.is_file():
        if ggufs := sorted(folder.glob("*.gguf")):
            raise TransActError(f"{folder} holds GGUF files; name one of them, as {ggufs[0]}.")
        raise TransActError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    try:
        raw = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        raise TransActError(f"{path} cannot be read as JSON.") from None
    if not isinstance(raw, dict):
        raise TransActError(f"{path} does not hold a configuration.")
    return raw


def _require_llama(folder: Path, raw: dict) -> None:
    named = raw.get("architectures")
    named = named[0] if isinstance(named, list) and named else named
    kind = raw.get("model_type", "llama")
    if not named or named == "LlamaForCausalLM":
        named = "LlamaForCausalLM" if kind == "llama" else f"model of the type {kind}"
    if named != "LlamaForCausalLM" or kind != "llama":
        raise TransActError(
            f"{folder} holds a {' '.join(str(named).split())}; only LlamaForCausalLM "
            "checkpoints can be pruned here."
        )
    quantisation = raw.get("quantization_config")
    if not quantisation:
        for name in ("quantize_config.json", "quant_config.json"):
            if (folder / name).is_file():
                raise TransActError(_quantised_refusal(folder, f"it has a {name}"))
        return
    method = "unknown"
    if isinstance(quantisation, dict):
        method = str(quantisation.get("quant_method", "unknown"))
    raise TransActError(_quantised_refusal(folder, QUANTISED_ADVICE.get(method, method)))


def _quantised_refusal(folder: Path, how: str) -> str:
    return (
        f"{folder} is quantised ({how}): its weights cannot be cut; prune the original float "
        "checkpoint and quantise the result."
    )


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
            if any(len(str(name)) > MAX_NAME_BYTES for name in names):
                raise ValueError("no file has so long a name")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TransActError(f"{index} is not a valid index of weight files.") from None
        files = [folder / str(name) for name in names]
        for file in files:
            if file.parent != folder:
                raise TransActError(f"{index} names a file outside its folder: {file.name}.")
            if file.suffix in PICKLE_SUFFIXES:
                raise TransActError(pickle_refusal(file.name))
            if not file.is_file():
                raise TransActError(f"{folder} lacks the weight file {file.name}.")
        return files
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        raise TransActError(
            f"{folder} holds {others[0]} but neither model.safetensors nor "
            "model.safetensors.index.json, so transformers would find no weights in it."
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise TransActError(pickle_refusal(pickles[0]))
    raise TransActError(f"{folder} holds no weights: there is no model.safetensors.")


def pickle_refusal(name: str) -> str:
    """Why a file of weights is not read, and what to do instead."""
    return (
        f"{name} is a pickle, which can run code when it is read, so it is not read; convert the "
        "model to safetensors where you trust it (save_pretrained does) and name that folder."
    )


def _stored_tensors(files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor, by its name, from the files' headers alone."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    header = stored.get_slice(name)
                    tensors[name] = tuple(header.get_shape()), header.get_dtype()
        except (SafetensorError, OSError, MemoryError) as error:
            raise TransActError(f"{file} is truncated or corrupt ({error}).") from None
    return tensors


def read_checkpoint(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """What stock transformers makes of a folder: weights from safetensors, and from there only."""
    return LlamaForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=ATTENTION,
    )


def load_folder(
    folder: Path, dtype: torch.dtype
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder that has been looked through.

    Raises:
        TransActError: transformers cannot load the one or the other.
    """
    tokenizer = _load_tokenizer(folder)
    try:
        model = read_checkpoint(folder, dtype)
    except Exception as error:
        raise TransActError(f"transformers could not load {folder}: {first_line(error)}.") from None
    return model, tokenizer


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    _require_modest_tokenizer(folder / "tokenizer.json")
    try:
        # Left to itself, transformers would ask at the terminal whether to run a folder's code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        raise TransActError(
            f"{folder} has no tokenizer that transformers can load ({first_line(error)}); "
            "copy the tokenizer files of the original model into it."
        ) from None


def _require_modest_tokenizer(path: Path) -> None:
    """Refuses replacements that blow a text up: they run before anything can look at the length."""
    if not path.is_file():
        return
    try:
        stored = json.loads(read_text(path))
        parts = [stored.get("normalizer"), stored.get("pre_tokenizer"), stored.get("decoder")]
    except (OSError, ValueError, AttributeError, RecursionError):
        raise TransActError(f"{path} cannot be read as a tokenizer.") from None
    for part in parts:
        growth, waiting = 1, [part]
        while waiting:
            step = waiting.pop()
            if isinstance(step, dict):
                words = (step.get("content"), step.get("prepend"), step.get("replacement"))
                growth *= max(1, *(len(word) for word in words if isinstance(word, str)), 1)
                waiting += step.values()
            elif isinstance(step, list):
                waiting += step
        if growth > MOST_GROWTH:
            raise TransActError(
                f"{path} replaces characters by up to {growth:,} others, which no tokenizer of a "
                "llama model does; it may be made to use up the memory."
            )


def _last_line(error: Exception) -> str:
    return [type(error).__name__, *str(error).strip().rstrip(".").splitlines()][-1].strip()
