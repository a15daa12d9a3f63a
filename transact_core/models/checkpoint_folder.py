"""A checkpoint folder, inspected before it is loaded.

Configuration, tensor names and shapes are checked from the headers of the weight files. Whatever
cannot become a dense model of a known family is refused in one sentence before weights are loaded.
Weights come from safetensors files only; nothing is unpickled and no remote code is run.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from transact_core.base.errors import INTERRUPTIONS, TransActError, first_line, last_line
from transact_core.base.files import MAX_NAME_BYTES, MAX_TEXT_BYTES, read_text
from transact_core.models.architecture import Architecture
from transact_core.models.families.description import rotary_kinds, rotary_parameters
from transact_core.models.families.refusals import require_known_family
from transact_core.models.families.table import family_of
from transact_core.models.layer_widths import (
    WIDTH_FIELDS,
    class_with_widths,
    narrow_layers,
    separated,
    with_overrides,
)
from transact_core.models.placement import hand_on
from transact_core.models.stock_class import StockConfig, StockModel
from transact_core.models.stored_layers import Places, StoredLayers, give_weights, read_weights

disable_progress_bar()  # progress is reported through our own callback
set_verbosity_error()  # our errors and notices say what is wrong with a model

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Suffixes of the files in a checkpoint folder that transformers or this package may read."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTISATION_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
}
"""Spelling of the quantisation methods that `quantization_config` may name."""
QUANTISED_TENSORS = (".qweight", ".qzeros", ".absmax", ".quant_state.bitsandbytes__nf4")
"""Endings of the names of tensors that only quantised checkpoints hold."""
QUANTISATION_PARTS = ("scale", "zero_point", "quant", "absmax", "g_idx", "codebook")
"""Parts of the names of tensors that float weights have to be combined with to be the model's."""
ATTENTION = "sdpa"
"""The attention that every model is loaded with. Left to itself, transformers would follow a
config.json that names code on the hub."""
MOST_GROWTH = 64
"""Largest number of characters that a tokenizer may replace one character by."""
MOST_LABELS = 100_000
"""Largest accepted `num_labels`, which transformers expands to a table of names."""
COMPARED_BYTES = 1 << 26
"""Bytes of each of two matrices that are compared at a time."""
CPU = torch.device("cpu")
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights that can be pruned, by their names in safetensors files."""


@dataclass(frozen=True)
class Inspection:
    """What a source holds, found before its weights are loaded."""

    architecture: Architecture
    files: list[Path]
    """The files that the weights are loaded from."""
    dtype: torch.dtype
    """Dtype of the stored weights; float16 where they are quantised in a GGUF file."""
    notices: tuple[str, ...] = ()
    """What the user should know about these files, a sentence each."""


def require_tensors(
    where: Path,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    described_by: str,
) -> str | None:
    """Checks that each tensor of the architecture is there; returns a notice about other tensors.

    Args:
        where: the folder or file, for messages.
        shapes: the shape of each stored tensor, by its name in transformers.
        described_by: what the architecture was read from, for messages.

    Raises:
        TransActError: a tensor is missing or its shape is not the one that `described_by` implies.
    """
    for name, shape in architecture.tensors():
        if name not in shapes:
            raise TransActError(f"The weights in {where} lack the tensor {name}.")
        if shapes[name] != shape:
            raise TransActError(
                f"The tensor {name} in {where} has shape {list(shapes[name])}, "
                f"where {described_by} makes it {list(shape)}."
            )
    left_over = _left_over(shapes, architecture)
    if not left_over:
        return None
    more = f" and {len(left_over) - 1:,} more" if len(left_over) > 1 else ""
    return (
        f"{where} holds tensors that a {architecture.family.class_name} of its configuration does "
        "not have; they "
        f"are left out: {left_over[0]}{more}."
    )


def _left_over(names: Iterable[str], architecture: Architecture) -> list[str]:
    """Names of the stored tensors that the architecture does not have, sorted.

    Old checkpoints hold the rotary frequencies, and some a copy of a tied LM head; neither counts.
    """
    expected = {name for name, _ in architecture.tensors()}
    return sorted(
        name
        for name in set(names) - expected
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    )


def inspect_folder(folder: Path) -> Inspection:
    """Architecture and weight files of a checkpoint folder, with each tensor's shape checked.

    Raises:
        TransActError: the folder does not hold a dense model of a known family.
    """
    _require_own_files(folder)
    raw = _read_config(folder)
    require_known_family(folder, raw)
    architecture = _read_architecture(folder, raw)
    files = _safetensors_files(folder, raw.get("transformers_weights"))
    stored = _stored_tensors(files)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    quantised = _named_quantisation(folder, raw)
    _require_float_weights(folder, architecture, stored, quantised)
    notices = []
    if quantised:
        notices.append(
            f"{folder} is described as quantised ({quantised}), but its weights are floats; they "
            "are loaded as they are."
        )
    if architecture.tie_word_embeddings and "lm_head.weight" in stored:
        architecture, notice = _untied_where_different(folder, architecture, stored)
        notices.append(notice)
    notices.append(require_tensors(folder, architecture, shapes, "config.json"))
    dtype = _stored_dtype(folder, architecture, stored)
    return Inspection(architecture, files, dtype, tuple(notice for notice in notices if notice))


def read_architecture(folder: Path) -> Architecture:
    """What the `config.json` of a folder that was written here describes."""
    return _read_architecture(folder, _read_config(folder))


def _read_architecture(folder: Path, raw: dict) -> Architecture:
    """The architecture that `config.json` describes, after checking fields that would do harm."""
    try:
        if (labels := raw.get("num_labels", 0)) > MOST_LABELS:
            raise ValueError(f"num_labels is {labels}")
        for name in ("output_attentions", "output_hidden_states"):
            if raw.get(name):
                raise ValueError(f"{name} is on, which keeps every layer's in memory")
        if not raw.get("return_dict", True):
            raise ValueError("return_dict is off")
        raw, overrides = separated(raw)
        config = family_of(raw.get("model_type", "llama")).read_config(raw)
        architecture = with_overrides(Architecture.from_config(config), overrides)
        for rotary in rotary_kinds(config):
            if rotary != "default" and rotary not in ROPE_INIT_FUNCTIONS:
                raise ValueError(f"the rope_type {rotary!r} is not one that transformers knows")
        if config.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}")
        if not 0 <= config.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps is {config.rms_norm_eps}")
        for parameters in rotary_parameters(config):
            if not 0 < (theta := parameters.get("rope_theta", 1.0)) < math.inf:
                raise ValueError(f"rope_theta is {theta}")
        ahead = family_of(config.model_type).not_causal_field
        if ahead and getattr(config, ahead):
            raise ValueError(f"{ahead} is on, so that this is no model of the next token")
    except Exception as error:
        reason = last_line(error)
        raise TransActError(
            f"{folder / 'config.json'} is not a valid configuration: {reason}."
        ) from None
    return architecture


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it, such as `BF16`."""


def _require_float_weights(
    folder: Path,
    architecture: Architecture,
    stored: dict[str, StoredTensor],
    quantised: str | None,
) -> None:
    """Refuses quantised weights, judged by the tensors' names and dtypes.

    `quantised` is the method that the configuration names. A name alone proves nothing: tools that
    dequantise a checkpoint, or merge adapters into it, often leave it behind.
    """
    if any(name.endswith(QUANTISED_TENSORS) for name in stored):
        method = quantised or "packed integers, as GPTQ and AWQ keep"
        raise TransActError(_quantised_refusal(folder, method))
    if not quantised:
        return
    has_integers = any(tensor.dtype not in STORED_DTYPES for tensor in stored.values())
    has_scales = any(
        part in name for name in _left_over(stored, architecture) for part in QUANTISATION_PARTS
    )
    if has_integers or has_scales:
        raise TransActError(_quantised_refusal(folder, quantised))


def _untied_where_different(
    folder: Path, architecture: Architecture, stored: dict[str, StoredTensor]
) -> tuple[Architecture, str | None]:
    """The architecture untied, and a notice, where a tied LM head is stored and is another matrix.

    transformers 5 loads such a checkpoint untied; a configuration that is saved as it is would have
    the stored LM head lost.
    """
    head, embedding = stored["lm_head.weight"], stored.get("model.embed_tokens.weight")
    if embedding is None:
        return architecture, None  # refused with the other missing tensors
    if head.shape != embedding.shape:
        raise TransActError(
            f"The tensor lm_head.weight in {folder} has shape {list(head.shape)}, where the "
            f"embedding that config.json ties it to has {list(embedding.shape)}; remove the tensor "
            "if it is left over."
        )
    if _same_values(embedding, "model.embed_tokens.weight", head, "lm_head.weight"):
        return architecture, None
    return replace(architecture, tie_word_embeddings=False), (
        f"config.json of {folder} says that the LM head is tied to the embedding, but the stored "
        "matrices differ; both are kept, and the model is treated as untied."
    )


def _same_values(one: StoredTensor, one_name: str, other: StoredTensor, other_name: str) -> bool:
    """Whether two matrices of one shape hold the same values; read in pieces."""
    rows = max(1, COMPARED_BYTES // max(1, 4 * math.prod(one.shape[1:])))
    with (
        safe_open(one.file, framework="pt") as one_file,
        safe_open(other.file, framework="pt") as other_file,
    ):
        first, second = one_file.get_slice(one_name), other_file.get_slice(other_name)
        return all(
            torch.equal(first[start : start + rows].float(), second[start : start + rows].float())
            for start in range(0, one.shape[0], rows)
        )


def _stored_dtype(
    folder: Path, architecture: Architecture, stored: dict[str, StoredTensor]
) -> torch.dtype:
    """The dtype of most of the parameters; all of them must be floats."""
    parameters: Counter[str] = Counter()
    for name, shape in architecture.tensors():
        dtype = stored[name].dtype
        if dtype not in STORED_DTYPES:
            raise TransActError(
                f"{folder} stores {name} as {dtype}; only float32, float16 and bfloat16 "
                "checkpoints can be pruned."
            )
        parameters[dtype] += math.prod(shape)
    return STORED_DTYPES[max(parameters, key=parameters.get)]


def _require_own_files(folder: Path) -> None:
    """Refuses links that lead out of the folder, and files that are far too large for their kind.

    What is read here may be written into an output folder, so a link could carry any file of this
    machine into it.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in READ_SUFFIXES:
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise TransActError(f"{path} is a link that leads nowhere; remove it.") from None
        if not _stays_in(folder, target):
            raise TransActError(
                f"{path} is a link out of its folder, to {target}; put the file itself there."
            )
        too_large = path.suffix != ".safetensors" and target.stat().st_size > MAX_TEXT_BYTES
        if not target.is_file() or too_large:
            raise TransActError(f"{path} is no file, or far too large for its kind; remove it.")


def _stays_in(folder: Path, target: Path) -> bool:
    """Whether a resolved path lies in the folder, or in the store of the hub's cache around it.

    The files of a snapshot in the hub's cache are links into `blobs`.
    """
    home = folder.resolve()
    in_hub_cache = home.parent.name == "snapshots" and home.parent.parent.name.startswith(
        "models--"
    )
    roots = [home, home.parent.parent / "blobs"] if in_hub_cache else [home]
    return any(target.is_relative_to(root) for root in roots)


def own_files(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that are files of ordinary size and no links out of `folder`, sorted."""
    return sorted(
        path
        for path in paths
        if path.is_file()
        and _stays_in(folder, path.resolve())
        and path.stat().st_size <= MAX_TEXT_BYTES
    )


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


def _named_quantisation(folder: Path, raw: dict) -> str | None:
    """The quantisation that the configuration or a file beside it names, None where none does."""
    if quantisation := raw.get("quantization_config"):
        method = "unknown"
        if isinstance(quantisation, dict):
            method = str(quantisation.get("quant_method", "unknown"))
        return QUANTISATION_NAMES.get(method, method)
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            return f"it has a {name}"
    return None


def _quantised_refusal(folder: Path, how: str) -> str:
    return (
        f"{folder} is quantised ({how}): its weights cannot be cut; prune the original float "
        "checkpoint and quantise the result."
    )


def _safetensors_files(folder: Path, named: object = None) -> list[Path]:
    """The weight files that transformers loads from a folder.

    The order of preference is that of `_get_resolved_checkpoint_files` in transformers 5: the file
    that the `transformers_weights` of `config.json` names (given as `named`), `model.safetensors`,
    then `model.safetensors.index.json`. Other files may be left over from an earlier save.
    """
    if named is not None:
        chosen = folder / str(named)
        if chosen.parent != folder or not chosen.name.endswith((".safetensors", INDEX_FILE)):
            raise TransActError(
                f"{folder / 'config.json'} names {str(named)!r} as its transformers_weights, which "
                "is no safetensors file of that folder."
            )
        if not chosen.is_file():
            raise TransActError(f"{folder} lacks the weight file {chosen.name}.")
        return _indexed_files(chosen) if chosen.suffix == ".json" else [chosen]
    if (single := folder / SINGLE_FILE).is_file():
        return [single]
    if (index := folder / INDEX_FILE).is_file():
        return _indexed_files(index)
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        raise TransActError(
            f"{folder} holds {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}, so "
            "transformers would find no weights in it."
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise TransActError(pickle_refusal(pickles[0]))
    raise TransActError(f"{folder} holds no weights: there is no {SINGLE_FILE}.")


def _indexed_files(index: Path) -> list[Path]:
    """The weight files that an index names, each checked to be there."""
    folder = index.parent
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


def pickle_refusal(name: str) -> str:
    """The message for a weight file that is not read because it is a pickle."""
    return (
        f"{name} is a pickle, which can run code when it is read, so it is not read; convert the "
        "model to safetensors where you trust it (save_pretrained does) and name that folder."
    )


def _stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Each tensor by its name, read from the files' headers."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    header = stored.get_slice(name)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    tensors[name] = StoredTensor(file, shape, dtype)
        except (SafetensorError, OSError, MemoryError) as error:
            raise TransActError(f"{file} is truncated or corrupt ({error}).") from None
    return tensors


def read_checkpoint(
    folder: Path, dtype: torch.dtype, tied: bool | None = None, device: torch.device = CPU
) -> StockModel:
    """The model that transformers loads from a folder, from safetensors files only.

    So are those whose layers have widths of their own, which stock transformers refuses.

    `tied` replaces `tie_word_embeddings` where the configuration contradicts the weights. A
    `quantization_config` is dropped: quantised weights were refused before. Each tensor is put on
    the device as it is read.
    """
    config, own_widths = _stock_config(folder, tied)
    return _from_pretrained(folder, config, dtype, device, own_widths)


def spread_checkpoint(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    of_layers: Sequence[torch.device],
    tied: bool | None = None,
) -> StockModel:
    """As `read_checkpoint`, with each layer on a device of its own (`placement`); `device` is that
    of all outside of the layers."""
    model, layers, places = _without_layers(folder, dtype, device, tied)
    for layer, of_layer, of_weights in zip(layers, of_layers, places, strict=True):
        give_weights(layer, read_weights(of_weights, dtype, of_layer))
    model.model.layers = nn.ModuleList(layers)
    hand_on(model)
    return model.eval()


def open_checkpoint(
    folder: Path, dtype: torch.dtype, device: torch.device, tied: bool | None = None
) -> StockModel:
    """As `read_checkpoint`, but for the decoder layers: those stay in the files and are read when
    they are borrowed (`stored_layers`)."""
    model, layers, places = _without_layers(folder, dtype, device, tied)
    model.model.layers = StoredLayers(layers, places, dtype, device)
    return model.eval().requires_grad_(False)


def _without_layers(
    folder: Path, dtype: torch.dtype, device: torch.device, tied: bool | None
) -> tuple[StockModel, list[nn.Module], list[Places]]:
    """A model without decoder layers, on a device; its layers, which have no weights yet; and where
    those of each one are."""
    config, own_widths = _stock_config(folder, tied)
    files = _safetensors_files(folder, getattr(config, "transformers_weights", None))
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0  # The rest of the model is what transformers loads then.
    model = _from_pretrained(folder, config, dtype, device)
    config = model.config
    config.num_hidden_layers = layers
    with torch.device("meta"):
        whole = type(model)(config)
        if own_widths is not None:
            narrow_layers(whole, own_widths)
        empty = list(whole.to(dtype).model.layers)
    stored = _stored_tensors(files)
    places = [
        {
            name: (stored[full].file, full)
            for name, _ in layer.named_parameters()
            for full in [f"model.layers.{layer_index}.{name}"]
        }
        for layer_index, layer in enumerate(empty)
    ]
    return model, empty, places


def _stock_config(folder: Path, tied: bool | None) -> tuple[StockConfig, Architecture | None]:
    """As `_read_model_config`, to load a model with."""
    config, own_widths = _read_model_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if tied is not None:
        config.tie_word_embeddings = tied
    return config, own_widths


def _from_pretrained(
    folder: Path,
    config: StockConfig,
    dtype: torch.dtype,
    device: torch.device = CPU,
    own_widths: Architecture | None = None,
) -> StockModel:
    family = family_of(config.model_type)
    model_class = family.model_class
    if own_widths is not None:
        model_class = class_with_widths(family, own_widths)
    model = model_class.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=ATTENTION,
        # On the CPU weights of this dtype are views of the files, which a map would copy.
        device_map=None if device == CPU else {"": device},
    )
    # What made its layers is done; the object is one of the stock class.
    model.__class__ = family.model_class
    return model.eval().requires_grad_(False)


def _read_model_config(folder: Path) -> tuple[StockConfig, Architecture | None]:
    """The configuration, and where layers have widths of their own the architecture that says so.

    The configuration then has the largest widths of any layer.
    """
    raw, overrides = separated(json.loads(read_text(folder / "config.json")))
    config = family_of(raw.get("model_type", "llama")).read_config(raw)
    if not overrides:
        return config, None
    architecture = with_overrides(Architecture.from_config(config), overrides)
    for name in WIDTH_FIELDS:
        setattr(config, name, getattr(architecture, name))
    return config, architecture


def load_folder(
    folder: Path,
    dtype: torch.dtype,
    tied: bool | None,
    device: torch.device,
    of_layers: Sequence[torch.device] = (),
    offload: bool = False,
) -> tuple[StockModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder that was inspected; `tied` as in `read_checkpoint`.

    The model is on the device. `of_layers` are the devices of its layers where those are on several
    (`spread_checkpoint`); with `offload` they stay on disk (`open_checkpoint`).

    Raises:
        TransActError: transformers cannot load one of the two.
    """
    tokenizer = _load_tokenizer(folder)
    try:
        if offload:
            model = open_checkpoint(folder, dtype, device, tied)
        elif of_layers:
            model = spread_checkpoint(folder, dtype, device, of_layers, tied)
        else:
            model = read_checkpoint(folder, dtype, tied, device)
    except Exception as error:
        raise TransActError(f"transformers could not load {folder}: {first_line(error)}.") from None
    return model, tokenizer


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    _require_modest_tokenizer(folder / "tokenizer.json")
    try:
        # Left to itself, transformers would ask at the terminal whether to run a folder's code.
        given = {"local_files_only": True, "trust_remote_code": False}
        config, own_widths = _read_model_config(folder)
        if own_widths is not None:
            # It looks into the configuration, which transformers cannot read from the folder.
            given["config"] = config
        return AutoTokenizer.from_pretrained(folder, **given)
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        raise TransActError(
            f"{folder} has no tokenizer that transformers can load ({first_line(error)}); "
            "copy the tokenizer files of the original model into it."
        ) from None


def _require_modest_tokenizer(path: Path) -> None:
    """Refuses tokenizers whose replacements make a text many times longer.

    Normalizers run before the length of a text can be checked, so they could use up the memory.
    """
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
                "language model does; it may be made to use up the memory."
            )
