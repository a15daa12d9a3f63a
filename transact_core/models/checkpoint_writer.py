"""Checkpoint files written tensor by tensor, so that the whole model is never in memory at once."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from transact_core.models.architecture import Architecture
from transact_core.models.devices import dtype_name
from transact_core.models.layer_widths import FIELD, per_layer_config

SHARD_BYTES = 250_000_000
"""Bytes of tensors after which a shard is written; what is not written yet waits in memory."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT_ROPE_FIELDS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
"""Fields of `rope_scaling` that transformers 4 warns of where they are whole numbers."""
LLAMA_BASE = 10_000.0
"""Base of the rotary frequencies where a configuration names none."""


class CheckpointWriter:
    """Collects tensors and writes them to `folder` in shards of at least `shard_bytes`.

    A single shard becomes `model.safetensors`; several get the usual names and an index.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._waiting_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes one tensor; writes a shard once enough bytes have come together."""
        stored = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
        self._waiting[name] = stored
        self._bytes += stored.nbytes
        self._waiting_bytes += stored.nbytes
        if self._waiting_bytes >= self.shard_bytes:
            self._write_shard()

    def add_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], model: PreTrainedModel
    ) -> None:
        """Takes all weights of a model, but for an LM head that is tied to the embedding."""
        for name, tensor in weights:
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                self.add(name, tensor)

    def _write_shard(self) -> None:
        self._shards.append(list(self._waiting))
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, shard: int) -> Path:
        return self.folder / f"part-{shard:05d}.safetensors"

    def finish(self, model: PreTrainedModel, architecture: Architecture | None = None) -> None:
        """Writes the last shard, gives the shards their final names, and saves the configurations.

        Of `model` only the configurations are read, not the weights. `architecture` says the widths
        of each layer where they are not those of the configuration.
        """
        if self._waiting or not self._shards:
            self._write_shard()
        count = len(self._shards)
        weight_map = {}
        for shard, names in enumerate(self._shards, start=1):
            file = SINGLE if count == 1 else f"model-{shard:05d}-of-{count:05d}.safetensors"
            self._part(shard).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        save_configurations(model, self.folder, self.dtype, architecture)


def save_configurations(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    architecture: Architecture | None = None,
) -> None:
    """Writes `config.json` and `generation_config.json` as transformers 5 and 4.57 read them.

    `architecture` as `CheckpointWriter.finish` takes it.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype_name(dtype)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored |= older_fields(stored)
    if architecture is not None and (own := per_layer_config(architecture)):
        stored[FIELD] = own
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    mend_generation_config(model)
    model.generation_config.save_pretrained(folder)


def older_fields(config: dict) -> dict:
    """The fields of a `config.json` that transformers before 5 reads in place of its own.

    Version 5 writes the rotary embedding as `rope_parameters` and the dtype as `dtype`. Version 4
    ignores the former and falls back to plain frequencies of base 10,000 without a warning; it
    reads `rope_theta` and `rope_scaling`, and before 4.56 `torch_dtype`. Version 5 still accepts
    the older fields and gives them precedence, so both have to say the same.
    """
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention")
    # Gemma 3's, one for each kind of layer.
    rope = rope.get("full_attention", rope)
    scaling = {
        name: float(value) if name in FLOAT_ROPE_FIELDS and isinstance(value, int) else value
        for name, value in rope.items()
        if name not in ("rope_theta", "partial_rotary_factor")
    }
    is_default = scaling.get("rope_type", "default") == "default"
    older = {
        "rope_theta": rope.get("rope_theta", LLAMA_BASE),
        "rope_scaling": None if is_default else scaling,
        "torch_dtype": config.get("dtype"),
    }
    if local:
        older["rope_local_base_freq"] = local["rope_theta"]
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") == "longrope" and original != config["max_position_embeddings"]:
        # Version 4 looks for this one beside `rope_scaling`, not in it.
        older["original_max_position_embeddings"] = original
    return older


def mend_generation_config(model: PreTrainedModel) -> None:
    """Sets `do_sample` where a generation config names a temperature without it.

    transformers loads such files, which are common among published models, and refuses to save
    them.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
