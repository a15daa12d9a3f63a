"""Checkpoint files written tensor by tensor, so that no model need be whole in memory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from transact_core.models.devices import dtype_name

SHARD_BYTES = 250_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointWriter:
    """Takes tensors as they are done and writes them in shards of a quarter of a gigabyte, since
    what is not written yet waits in memory.

    One shard becomes `model.safetensors`; several get the usual names and index.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._waiting_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps one tensor in the checkpoint's dtype, or writes it with those before it."""
        stored = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
        self._waiting[name] = stored
        self._bytes += stored.nbytes
        self._waiting_bytes += stored.nbytes
        if self._waiting_bytes >= self.shard_bytes:
            self._write_shard()

    def _write_shard(self) -> None:
        self._shards.append(list(self._waiting))
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def finish(self, model: LlamaForCausalLM) -> None:
        """Writes what waits, the names, and the configurations of `model`, whose weights are not
        looked at."""
        if self._waiting or not self._shards:
            self._write_shard()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        save_configurations(model, self.folder, self.dtype)


def save_configurations(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """`config.json` and `generation_config.json`, as stock transformers writes them."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype_name(dtype)
    model.config.save_pretrained(folder)
    mend_generation_config(model)
    model.generation_config.save_pretrained(folder)


def mend_generation_config(model: LlamaForCausalLM) -> None:
    """Makes one savable that names a temperature without `do_sample`.

    Published ones do; transformers loads them and refuses to save them.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
