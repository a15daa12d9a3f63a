"""A cut that is written layer by layer, so that it is never in memory as a whole.

Layers are cut, repaired, written and let go of one after the other. A model written so can be
opened with its layers on disk, as its dense model may have been.
"""

import weakref
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import disk_trouble, require_disk_space, temporary_folder
from transact_core.data.windows import Windows
from transact_core.forward.layers import on_disk
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import open_checkpoint
from transact_core.models.checkpoint_writer import CheckpointWriter
from transact_core.models.stock_class import StockModel
from transact_core.pruning.closed_form import LayerFit, recover, recover_by_layers
from transact_core.pruning.plan import PruningPlan
from transact_core.pruning.surgery import Cut, prune, round_weights


def write_layers(
    folder: Path,
    dense: StockModel,
    plan: PruningPlan,
    windows: Windows,
    recovery: str,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> tuple[LayerFit, ...]:
    """Cuts, repairs and writes a checkpoint in this dtype; gives the repairs' fits.

    Raises:
        TransActError: the plan does not fit the model, or an activation is NaN or infinite.
    """
    cut = Cut(dense, plan, with_biases=recovery == "bias")
    writer = CheckpointWriter(folder, dtype)

    def write_layer(layer_index: int) -> None:
        for name, tensor in cut.pruned.model.layers[layer_index].state_dict().items():
            writer.add(f"model.layers.{layer_index}.{name}", tensor)
        cut.drop_layer(layer_index)

    fits: tuple[LayerFit, ...] = ()
    if recovery != "none" and plan.cuts_anything(cut.architecture):
        fits = recover_by_layers(cut, windows, recovery, progress, write_layer).fits
    else:
        for layer_index in range(len(plan.layers)):
            cut.make_layer(layer_index)
            write_layer(layer_index)
    progress("Writing the checkpoint", 0, 1)
    # Written last, since tensors wait in memory until a shard is full.
    for name in cut.architecture.outer_tensors():
        writer.add(name, cut.pruned.get_parameter(name))
    writer.finish(cut.pruned, cut.left)
    progress("Writing the checkpoint", 1, 1)
    return fits


def repaired_cut(
    dense: StockModel,
    plan: PruningPlan,
    windows: Windows,
    recovery: str,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> tuple[StockModel, tuple[LayerFit, ...]]:
    """Cuts, repairs, and rounds the weights to a dtype; gives the pruned model and the repairs'
    fits.

    Where the dense model's layers are on disk, so are those of the pruned one.

    Raises:
        TransActError: as `write_layers` and `cut_on_disk`.
    """
    if on_disk(dense):
        return cut_on_disk(dense, plan, windows, recovery, dtype, progress)
    model = prune(dense, plan, with_biases=recovery == "bias")
    fits: tuple[LayerFit, ...] = ()
    if recovery != "none" and plan.cuts_anything(Architecture.from_model(dense)):
        fits = recover(dense, model, plan, windows, recovery, progress).fits
    round_weights(model, dtype)
    return model, fits


def cut_on_disk(
    dense: StockModel,
    plan: PruningPlan,
    windows: Windows,
    recovery: str,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> tuple[StockModel, tuple[LayerFit, ...]]:
    """Cuts and repairs into a temporary checkpoint of this dtype, and opens it with its layers on
    disk; the fits are those of the repair.

    The model computes in the dense one's dtype. The checkpoint is removed with the model.

    Raises:
        TransActError: as `write_layers`, or the disk of the cache folder is too full.
    """
    with ExitStack() as until_opened:
        try:
            folder = until_opened.enter_context(temporary_folder("cut"))
            left = plan.applied_to(Architecture.from_model(dense), with_biases=recovery == "bias")
            require_disk_space(folder, left.parameters * dtype.itemsize)
            fits = write_layers(folder, dense, plan, windows, recovery, dtype, progress)
            model = open_checkpoint(folder, dense.dtype, dense.device)
        except (OSError, SafetensorError) as error:
            if reason := disk_trouble(error):
                raise TransActError(f"The pruned model was not written: {reason}.") from None
            raise
        weakref.finalize(model.model.layers, until_opened.pop_all().close)
    return model, fits
