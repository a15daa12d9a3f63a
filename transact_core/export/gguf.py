"""A model as a GGUF file that stock llama.cpp runs, in any of its usual types.

What a file will hold, and how many bytes it takes, is planned from widths and tokenizer before any
weight is touched (`plan_file`). Writing goes tensor by tensor, whole or not at all (`write_file`).

A model that computes what a LLaMA does is of llama.cpp's architecture `llama`, whatever stock class
it is saved as; with widths of its own in each layer it is of `deci`, which computes the same. Other
families have an architecture of their own, of which their description says what it can hold.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    RopeScalingType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.gguf_writer import WriterState
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import disk_trouble, expanded, require_disk_space, staged_file
from transact_core.data.windows import Windows
from transact_core.export.gguf_types import (
    FLOATS,
    Quantization,
    Type,
    possible_type,
    quantization,
    stored_bytes,
    wanted_type,
)
from transact_core.export.gguf_vocabulary import Entry, vocabulary_of, vocabulary_of_file
from transact_core.export.runtimes import BLOCK, SUPER_BLOCK
from transact_core.forward.imatrix import Imatrix, importance_matrix
from transact_core.models.architecture import Architecture
from transact_core.models.families.description import AsGguf, sliding_window
from transact_core.models.llama_cpp import LlamaCpp, require_llama_cpp, running
from transact_core.models.load import BUILTIN, LoadedModel, builtin_gguf
from transact_core.models.stock_class import StockConfig
from transact_core.pruning.plan import widths

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that each rotary frequency is divided by, float32 of shape (head_dim / 2,)."""
ARCHITECTURES = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
VALUE_BYTES = {
    kind: size
    for size, kinds in {
        1: (GGUFValueType.BOOL, GGUFValueType.INT8, GGUFValueType.UINT8),
        2: (GGUFValueType.INT16, GGUFValueType.UINT16),
        4: (GGUFValueType.INT32, GGUFValueType.UINT32, GGUFValueType.FLOAT32),
        8: (GGUFValueType.INT64, GGUFValueType.UINT64, GGUFValueType.FLOAT64),
    }.items()
    for kind in kinds
}
KINDS = {bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
"""The kind of a metadata value by its type; whole numbers are `uint32`."""


@dataclass(frozen=True)
class Description:
    """What a GGUF file says of a model whatever type its weights are written in."""

    architecture: Architecture
    kind: AsGguf
    """What llama.cpp computes of it."""
    entries: tuple[Entry, ...] = field(repr=False)
    rope_factors: np.ndarray | None = field(default=None, repr=False)
    """What default frequencies are divided by, None where the metadata says it all."""

    @cached_property
    def entry_bytes(self) -> int:
        """What the entries take in a header, the same in every type; long to count."""
        return sum(map(_entry_bytes, self.entries))

    @cached_property
    def names(self) -> TensorNameMap:
        """llama.cpp's names of the tensors; long to make, and the same in every type."""
        return get_tensor_name_map(
            ARCHITECTURES[self.kind.architecture], self.architecture.num_hidden_layers
        )


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file before it is written."""

    name: str
    source: str | None
    """Its name in transformers; None for the rotary factors."""
    shape: tuple[int, ...]
    kind: Type
    wanted: Type
    """The type that it would have if its rows allowed it."""

    @property
    def bytes(self) -> int:
        return stored_bytes(self.shape, self.kind)

    @property
    def falls_back(self) -> bool:
        return self.kind != self.wanted


@dataclass(frozen=True)
class Fallback:
    """Matrices that get another type than their quantisation means, because of their width."""

    row: int
    """Weights in a row."""
    wanted: str
    taken: str
    tensors: int
    bytes_more: int
    """What they take on top of what the wanted type would, were the rows divisible, in bytes."""
    mend: str | None
    """The option that would make the rows divisible; None where pruning leaves their length."""

    @property
    def sentence(self) -> str:
        first = (
            f"{self.tensors} tensors with rows of {self.row:,} are {self.taken} where "
            f"{self.wanted} was meant, which takes {self.bytes_more / 1e6:.1f} MB more"
        )
        return f"{first}; {self.mend} mends it." if self.mend else f"{first}."


@dataclass(frozen=True)
class FilePlan:
    """A GGUF file before it is written."""

    quantization: Quantization
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    entries: tuple[Entry, ...] = field(repr=False)
    entry_bytes: int
    """What the entries take in the header."""
    in_pairs: bool = True
    """As `AsGguf` has it."""
    rope_factors: np.ndarray | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """The exact size of the file."""
        header = _header_bytes(self.entry_bytes, self.tensors)
        return _padded(header) + sum(_padded(tensor.bytes) for tensor in self.tensors)

    @property
    def embedding_bytes(self) -> int:
        """Of embedding and LM head, which pruning leaves as they are."""
        outer = ("token_embd.weight", "output.weight")
        return sum(tensor.bytes for tensor in self.tensors if tensor.name in outer)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Tensors whose width gives them another type, by width and type."""
        groups: dict[tuple, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            if tensor.falls_back:
                key = (tensor.shape[-1], tensor.wanted, tensor.kind, _part(tensor.name))
                groups.setdefault(key, []).append(tensor)
        merged: dict[tuple, list[PlannedTensor]] = {}
        for (row, wanted, kind, part), tensors in groups.items():
            merged.setdefault((row, wanted, kind, _mend(part, row, wanted)), []).extend(tensors)
        return tuple(
            Fallback(
                row=row,
                wanted=wanted.name,
                taken=kind.name,
                tensors=len(tensors),
                bytes_more=sum(
                    tensor.bytes
                    - math.ceil(math.prod(tensor.shape) * _bytes_of_weight(tensor.wanted))
                    for tensor in tensors
                ),
                mend=mend,
            )
            for (row, wanted, kind, mend), tensors in merged.items()
        )


def _bytes_of_weight(kind: Type) -> float:
    weights, size = GGML_QUANT_SIZES[kind]
    return size / weights


def _part(name: str) -> str:
    """`ffn_down` of `blk.3.ffn_down.weight`."""
    return name.split(".")[-2]


def _mend(part: str, row: int, wanted: Type) -> str | None:
    block = GGML_QUANT_SIZES[wanted][0]
    if part == "ffn_down":
        return f"--multiple-of {block}"
    if part == "attn_output":
        return "another number of heads, or of dimensions of them (--head-dim-multiple-of),"
    return None


# --- describing ------------------------------------------------------------------------------


def describe(
    loaded: LoadedModel,
    config: StockConfig | None = None,
    architecture: Architecture | None = None,
    vocabulary: tuple[Entry, ...] | None = None,
    name: str | None = None,
) -> Description:
    """What a file says of a loaded model, or of a cut of it.

    `config` and `architecture` are those of the cut where it is one, `vocabulary` the tokenizer's
    metadata where it is not that of `loaded`, `name` what the file calls the model.

    Raises:
        TransActError: llama.cpp has no such rotary embedding or tokenizer.
    """
    config = config or loaded.model.config
    architecture = architecture or loaded.architecture
    return describe_model(
        config,
        architecture,
        vocabulary_for(loaded) if vocabulary is None else vocabulary,
        name or loaded.name,
        loaded.licence and (loaded.licence.name or loaded.licence.identifier),
    )


def vocabulary_for(loaded: LoadedModel) -> tuple[Entry, ...]:
    """The tokenizer's metadata: every key of a GGUF source, else as the tokenizer gives it."""
    source = source_file(loaded)
    if source is not None:
        return vocabulary_of_file(source)
    generation = getattr(loaded.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    end_ids = tuple(ends) if isinstance(ends, list) else ()
    return vocabulary_of(loaded.tokenizer, loaded.architecture.vocab_size, loaded.folder, end_ids)


def source_file_named(source: str) -> Path:
    """The GGUF file that a source names, for a runtime that takes no other.

    Raises:
        TransActError: it names something else, or the built-in model is not installed.
    """
    if source.strip() == BUILTIN:
        return builtin_gguf()
    path = expanded(source.strip())
    if path.suffix.lower() != ".gguf":
        raise TransActError(
            f"llama.cpp runs GGUF files, which {source} is not; write one of it with "
            "`python -m transact_core gguf`."
        )
    return path


def source_file(loaded: LoadedModel) -> Path | None:
    """The GGUF file that a model was loaded from; None for other sources."""
    if loaded.source == BUILTIN:
        return builtin_gguf()
    path = expanded(loaded.source)
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def describe_model(
    config: StockConfig,
    architecture: Architecture,
    vocabulary: tuple[Entry, ...],
    name: str,
    licence: str | None = None,
) -> Description:
    """What a file says of a model with this configuration and these widths.

    Raises:
        TransActError: no architecture of llama.cpp computes it, such as one with rotary
            frequencies that depend on the length of the text.
    """
    factors, rope = _rotary(config, architecture.head_dim)
    kind = _kind_of(config, architecture, with_factors=factors is not None)
    if factors is not None and not kind.rope_factors:
        raise TransActError(
            f"A GGUF file of the architecture {kind.architecture} cannot hold rotary frequencies "
            f"of the kind {config.rope_parameters['rope_type']!r}."
        )
    layers = architecture.layers

    def each(width: str) -> int | list[int]:
        widths = [getattr(layer, width) for layer in layers]
        return widths[0] if architecture.uniform else widths

    general = {"architecture": kind.architecture, "type": "model", "name": name}
    if licence:
        general["license"] = licence
    own = {
        "block_count": architecture.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": architecture.hidden_size,
        "feed_forward_length": each("intermediate_size"),
        "attention.head_count": each("num_attention_heads"),
        "attention.head_count_kv": each("num_key_value_heads"),
        "attention.key_length": architecture.head_dim,
        "attention.value_length": architecture.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": architecture.vocab_size,
        "rope.dimension_count": architecture.head_dim,
        **rope,
        **{key: float(getattr(config, name)) for key, name in kind.scales.items()},
    }
    entries = [_entry(f"general.{key}", value) for key, value in general.items()]
    entries += [_entry(f"{kind.architecture}.{key}", value) for key, value in own.items()]
    return Description(architecture, kind, (*entries, *vocabulary), factors)


def _kind_of(config: StockConfig, architecture: Architecture, with_factors: bool) -> AsGguf:
    """How a model is written; refuses what llama.cpp would read otherwise and say nothing.

    `with_factors` is whether its rotary frequencies are divided by factors of their own.

    Raises:
        TransActError: no architecture of llama.cpp computes what the model does.
    """
    family = architecture.family
    kind = AsGguf() if family.computes_as_llama(config) else family.as_gguf
    if kind is None:
        raise TransActError(f"GGUF files of {family.title} models are not written.")
    is_narrow = architecture.mha_width != architecture.hidden_size
    does_not_fit = (
        (is_narrow and not kind.any_attention_width)
        or (with_factors and not kind.rope_factors)
        or not architecture.uniform
    )
    if does_not_fit and kind.or_llama:
        kind = AsGguf()
    if not architecture.uniform:
        if kind != AsGguf():
            raise TransActError(
                f"Layers of different widths cannot be written as a GGUF file of {family.title}; "
                "choose the same widths for all layers."
            )
        kind = replace(kind, architecture="deci")
    if is_narrow and not kind.any_attention_width:
        raise TransActError(
            f"llama.cpp reads a {family.title} model only where its heads together are as wide as "
            f"the hidden size ({architecture.mha_width} of {architecture.hidden_size} here); "
            "choose a ratio of 0 for the attention."
        )
    every = kind.unrotated
    rotates = [family.rotates(config, layer) for layer in range(architecture.num_hidden_layers)]
    expected = [every is None or (layer + 1) % every != 0 for layer in range(len(rotates))]
    odd = {
        "hidden_act": getattr(config, "hidden_act", "silu") not in ("silu", "swish"),
        "sliding_window": sliding_window(config) is not None,
        "attention_bias": architecture.attention_bias and not kind.attention_bias,
        "mlp_bias": architecture.mlp_bias and not kind.mlp_bias,
        family.rotates_field: rotates != expected,
        "partial_rotary_factor": getattr(config, "partial_rotary_factor", None)
        not in (None, 1, 1.0),
    }
    for name, is_odd in odd.items():
        if is_odd:
            raise TransActError(
                f"The model's {name} is {getattr(config, name)}, which a GGUF file of the "
                f"architecture {kind.architecture} cannot say."
            )
    return kind


def _rotary(config: StockConfig, head_dim: int) -> tuple[np.ndarray | None, dict[str, object]]:
    """The rotary factors and the `rope.*` entries of a configuration."""
    rope = config.rope_parameters or {}
    kind, theta = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10_000.0))
    entries: dict[str, object] = {"rope.freq_base": theta}
    if kind == "default":
        return None, entries
    if kind == "linear":
        entries["rope.scaling.type"] = RopeScalingType.LINEAR.value
        entries["rope.scaling.factor"] = float(rope["factor"])
        return None, entries
    if kind == "longrope" and list(rope["short_factor"]) == list(rope["long_factor"]):
        # Narrower heads: exact frequencies, and nothing that depends on the length of a text.
        factors = np.array(rope["long_factor"], dtype=np.float32)
        scaling = rope.get("attention_factor", 1.0)
    elif kind in ("llama3", "yarn"):
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        default = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        factors = (default / frequencies.double()).float().numpy()
    else:
        raise TransActError(
            f"The rotary frequencies of the kind {kind!r} depend on the length of the text in a "
            "way that a GGUF file of this architecture cannot say."
        )
    if scaling != 1.0:
        entries["rope.scaling.attn_factor"] = float(scaling)
    return factors, entries


def _entry(key: str, value: object) -> Entry:
    if isinstance(value, list):
        return Entry(key, value, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    return Entry(key, value, KINDS.get(type(value), GGUFValueType.UINT32))


# --- planning --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImatrixSource:
    """The text that an importance matrix was measured on."""

    source: str
    windows: int


def plan_file(
    description: Description, chosen: str | Quantization, imatrix: ImatrixSource | None = None
) -> FilePlan:
    """The tensors of a file with their types, and its exact size, before any weight is read.

    Raises:
        TransActError: there is no quantisation of that name.
    """
    chosen = quantization(chosen) if isinstance(chosen, str) else chosen
    tensors = tuple(_planned(description, chosen, imatrix is not None))
    own = [Entry("general.file_type", int(chosen.file_type), GGUFValueType.UINT32)]
    if not chosen.is_float:
        own.append(Entry("general.quantization_version", GGML_QUANT_VERSION, GGUFValueType.UINT32))
    if imatrix is not None:
        own += [
            Entry("quantize.imatrix.dataset", imatrix.source, GGUFValueType.STRING),
            Entry("quantize.imatrix.chunks_count", imatrix.windows, GGUFValueType.INT32),
        ]
    return FilePlan(
        chosen,
        tensors,
        (*description.entries, *own),
        description.entry_bytes + sum(map(_entry_bytes, own)),
        description.kind.in_pairs,
        description.rope_factors,
    )


def _planned(
    description: Description, chosen: Quantization, with_imatrix: bool
) -> Iterator[PlannedTensor]:
    architecture = description.architecture
    if description.rope_factors is not None:
        shape = description.rope_factors.shape
        yield PlannedTensor(ROPE_FACTORS, None, shape, Type.F32, Type.F32)
    for source, shape in architecture.tensors():
        name = description.names.get_name(source, try_suffixes=(".weight", ".bias"))
        if len(shape) == 1:  # norms and biases
            yield PlannedTensor(name, source, shape, Type.F32, Type.F32)
            continue
        layer_index = int(name.split(".")[1]) if name.startswith("blk.") else None
        wanted = wanted_type(
            _part(name), layer_index, chosen, architecture, shape[-1], with_imatrix
        )
        yield PlannedTensor(name, source, shape, possible_type(wanted, shape[-1]), wanted)


def _header_bytes(entry_bytes: int, tensors: Sequence[PlannedTensor]) -> int:
    """The length of `_header`, which takes long to make where the vocabulary is large."""
    start = 4 + 4 + 8 + 8  # magic, version, numbers of tensors and of entries
    named = sum(
        _string_bytes(tensor.name) + 4 + 8 * len(tensor.shape) + 4 + 8 for tensor in tensors
    )
    return start + named + entry_bytes


def _entry_bytes(entry: Entry) -> int:
    start = _string_bytes(entry.key) + 4
    if entry.kind != GGUFValueType.ARRAY:
        return start + _value_bytes(entry.value, entry.kind)
    items = entry.items or GGUFValueType.get_type(entry.value[0])
    return start + 4 + 8 + sum(_value_bytes(value, items) for value in entry.value)


def _value_bytes(value: object, kind: GGUFValueType) -> int:
    return _string_bytes(value) if kind == GGUFValueType.STRING else VALUE_BYTES[kind]


def _string_bytes(text: str | bytes) -> int:
    return 8 + len(text.encode() if isinstance(text, str) else text)


def _header(entries: Sequence[Entry], tensors: tuple[PlannedTensor, ...]) -> bytes:
    """Everything of a file before its first tensor, without padding."""
    writer = GGUFWriter(None, "llama")
    for entry in entries:
        writer.kv_data[0].pop(entry.key, None)  # the architecture, which the writer has put there
        writer.add_key_value(entry.key, entry.value, entry.kind, sub_type=entry.items)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind
        )
    # Into memory in place of a file.
    written = io.BytesIO()
    writer.fout, writer.state = [written], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return written.getvalue()


def _padded(size: int) -> int:
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


NEAR = 0.05
"""How far from the ratio that was asked for a width may be that every type takes, as a fraction of
the dense width."""


def default_multiples(dense: Architecture, mlp_ratio: float) -> tuple[int, int]:
    """The multiples for the MLP's width and for narrower heads when GGUF files are wanted.

    256 for the MLP, which every type takes, where that is near the ratio, else 32. The dims of
    heads are multiples of 32, which quantised caches of keys and values take.
    """
    width = widths(dense, 0.0, mlp_ratio, "query-heads", SUPER_BLOCK).intermediate_size
    removed = 1 - width / dense.intermediate_size
    multiple = SUPER_BLOCK if abs(removed - mlp_ratio) <= NEAR else BLOCK
    return multiple, BLOCK


# --- writing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenFile:
    """A GGUF file that was written."""

    path: Path
    quantization: str
    bytes: int
    imatrix: str | None
    """The text that its importance matrix was measured on; None where it has none."""
    fallbacks: tuple[Fallback, ...] = ()


def export_gguf(
    outputs: Mapping[str, Path],
    loaded: LoadedModel,
    calibration: Windows | None = None,
    vocabulary: tuple[Entry, ...] | None = None,
    name: str | None = None,
    progress: Progress = silent,
    threads: int | None = None,
    told: Callable[[FilePlan], None] = lambda _: None,
    imatrix: Imatrix | None = None,
) -> list[WrittenFile]:
    """Writes a model in several types, each file whole or not at all; all are planned before.

    Args:
        outputs: The file of each quantisation, by its name.
        calibration: Windows for the importance matrix, which is measured once and used below Q8_0;
            None for none.
        vocabulary: The tokenizer's metadata, where it is not that of `loaded`.
        name: What the files call the model, where it is not the name of its source.
        told: Called with the plan of each file before anything is computed.
        imatrix: The importance matrix of these calibration windows, where it is measured already.

    Raises:
        TransActError: as `describe` and `write_file` do.
    """
    loaded.require_whole("Writing a GGUF file")
    description = describe(loaded, vocabulary=vocabulary, name=name)
    source = calibration and ImatrixSource(calibration.source, len(calibration))
    plans = {}
    for chosen in map(quantization, outputs):
        plans[chosen.name] = plan_file(
            description, chosen, source if chosen.wants_imatrix else None
        )
        told(plans[chosen.name])
    if any(not plan.quantization.is_float for plan in plans.values()):
        require_llama_cpp()
    weighted = [plan for plan in plans.values() if calibration and plan.quantization.wants_imatrix]
    if weighted and imatrix is None:
        imatrix = importance_matrix(loaded.model, calibration, progress)
    written = []
    for output, plan in zip(outputs.values(), plans.values(), strict=True):
        own = imatrix if plan in weighted else None
        write_file(output, plan, loaded.architecture, _weight_of(loaded), own, progress, threads)
        used = calibration.source if own else None
        written.append(
            WrittenFile(output, plan.quantization.name, plan.bytes, used, plan.fallbacks)
        )
    return written


def _weight_of(loaded: LoadedModel) -> Callable[[str], torch.Tensor]:
    """Gives the weights of a model as they are stored, whatever dtype it computes in."""
    return lambda name: loaded.model.get_parameter(name).to(loaded.source_dtype)


def write_file(
    output: Path,
    plan: FilePlan,
    architecture: Architecture,
    weight: Callable[[str], torch.Tensor],
    imatrix: Imatrix | None = None,
    progress: Progress = silent,
    threads: int | None = None,
) -> None:
    """Writes a planned file, whole or not at all.

    Args:
        weight: Gives a tensor by its name in transformers, such as a model's `get_parameter`.
        imatrix: The importance matrix that the plan was made for.

    Raises:
        TransActError: llama.cpp is needed and not installed, the weights cannot be represented in
            the type, or the disk is full.
    """
    if not plan.quantization.is_float:
        with running(threads) as runtime:
            _write(output, plan, architecture, weight, imatrix, progress, runtime)
    else:
        _write(output, plan, architecture, weight, imatrix, progress, None)


def _write(
    output: Path,
    plan: FilePlan,
    architecture: Architecture,
    weight: Callable[[str], torch.Tensor],
    imatrix: Imatrix | None,
    progress: Progress,
    runtime: LlamaCpp | None,
) -> None:
    require_disk_space(output, plan.bytes)
    stage = f"Writing {plan.quantization.name}"
    try:
        with staged_file(output) as staging, staging.open("wb") as file:
            header = _header(plan.entries, plan.tensors)
            file.write(header)
            file.write(bytes(_padded(len(header)) - len(header)))
            for done, tensor in enumerate(plan.tensors):
                progress(stage, done, len(plan.tensors))
                content = _content(tensor, plan, architecture, weight, imatrix, runtime)
                if len(content) != tensor.bytes:
                    raise TransActError(
                        f"The tensor {tensor.source} has another shape than the model's widths say."
                    )
                file.write(content)
                file.write(bytes(_padded(len(content)) - len(content)))
    except OSError as error:
        raise TransActError(
            f"{output} was not written: {disk_trouble(error) or error.strerror or error}."
        ) from None
    progress(stage, len(plan.tensors), len(plan.tensors))


def _content(
    tensor: PlannedTensor,
    plan: FilePlan,
    architecture: Architecture,
    weight: Callable[[str], torch.Tensor],
    imatrix: Imatrix | None,
    runtime: LlamaCpp | None,
) -> bytes:
    """The bytes of one tensor."""
    if tensor.source is None:
        return plan.rope_factors.tobytes()
    values = weight(tensor.source).detach()
    heads = _heads_of(tensor.name, architecture) if plan.in_pairs else None
    if heads:
        values = in_pairs(values, heads)
    if tensor.kind in FLOATS:
        return _as_float(values, tensor)
    values = _finite(values.float().cpu(), tensor)
    importance = imatrix.get(tensor.source) if imatrix else None
    return runtime.quantise(values.numpy(), tensor.kind, importance)


def _heads_of(name: str, architecture: Architecture) -> int | None:
    """The heads whose rotary dims a tensor holds; None where it holds none."""
    if not name.startswith("blk."):
        return None
    widths = architecture.widths_of(int(name.split(".")[1]))
    return {"attn_q": widths.num_attention_heads, "attn_k": widths.num_key_value_heads}.get(
        _part(name)
    )


def in_pairs(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order.

    transformers rotates dims i and i + head_dim / 2 of a head together, llama.cpp's `llama` dims 2i
    and 2i + 1.
    """
    split = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _as_float(values: torch.Tensor, tensor: PlannedTensor) -> bytes:
    dtypes = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    stored = _finite(values.to(dtypes[tensor.kind]).cpu().contiguous(), tensor)
    if tensor.kind == GGMLQuantizationType.BF16:
        stored = stored.view(torch.int16)
    return stored.numpy().tobytes()


def _finite(values: torch.Tensor, tensor: PlannedTensor) -> torch.Tensor:
    """The values, where all are numbers; quantisers would write something in place of others."""
    if not values.isfinite().all():
        raise TransActError(
            f"The tensor {tensor.source} holds weights that {tensor.kind.name} cannot represent; "
            "choose another quantization, or mend the model where they are damaged."
        )
    return values
