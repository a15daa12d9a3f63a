"""Measured tensors kept on disk between runs, keyed by all that determined them."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from transact_core import __version__
from transact_core.base.files import cache_folder, staged_file

Tensors = dict[str, torch.Tensor]


def remembered(key: dict[str, object], compute: Callable[[], Tensors]) -> Tensors:
    """What `compute` gave the first time it was asked for under this key.

    `key` is as `digest` takes it. Keeping is a convenience: where the cache cannot be written, the
    result is computed each time.
    """
    path = cache_folder() / "measured" / f"{digest(key)}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        tensors = compute()
    _keep(path, tensors)
    return tensors


def digest(key: dict[str, object]) -> str:
    """SHA-256 of what determined a result.

    `key` must be JSON and name everything the result depends on; the versions of torch,
    transformers and this package, the number of threads and the processor's instruction set are
    added here.
    """
    determined_by = key | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transact_core": __version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()


def _keep(path: Path, tensors: Tensors) -> None:
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)


def sha256_of_tokens(ids: torch.Tensor) -> str:
    """Fingerprint of token ids and of how they are cut into windows."""
    shape = str(tuple(ids.shape)).encode()
    return hashlib.sha256(shape + ids.cpu().long().contiguous().numpy().tobytes()).hexdigest()
