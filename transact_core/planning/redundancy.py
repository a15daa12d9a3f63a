"""How much of the transitional activations' energy a plan keeps, known before anything is cut."""

import torch

from transact_core.forward.waists import head_rows
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture
from transact_core.pruning.plan import PruningPlan


def kept_channels(plan: PruningPlan, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Which channels of each module's transitional activation stay, by module.

    Shape (layers, dense width), bool. For narrower heads these are the kept dims of the values.
    """
    layers = architecture.num_hidden_layers
    kept = {
        "mha": torch.zeros(layers, architecture.mha_width, dtype=torch.bool),
        "mlp": torch.zeros(layers, architecture.intermediate_size, dtype=torch.bool),
    }
    for layer_index, layer in enumerate(plan.layers):
        kept["mlp"][layer_index, list(layer.kept_channels)] = True
        if plan.head_dim:
            dims = torch.tensor(layer.value_dims).repeat_interleave(
                architecture.queries_per_group, dim=0
            )
            heads = kept["mha"][layer_index].view(-1, architecture.head_dim)
            heads.scatter_(1, dims, True)
        else:
            kept["mha"][layer_index, head_rows(layer.kept_heads, architecture.head_dim)] = True
    return kept


def kept_share(energies: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The share of each layer's energy that the kept channels hold; shape (layers,).

    Both have shape (layers, width). A layer without any energy keeps all of it.
    """
    total = energies.sum(dim=1)
    held = energies.where(kept, 0).sum(dim=1)
    return torch.where(total > 0, held / total, 1.0)


def written_energies(activation_weight: Scores) -> dict[str, torch.Tensor]:
    """`Σ_tokens a_j² · ‖W_j‖²`: the energy of what channel j alone writes to the residual stream.

    It is the square of the scores of the importance `activation-weight`. By module, shape
    (layers, width).
    """
    return {
        "mha": activation_weight.head_channels.square(),
        "mlp": activation_weight.channels.square(),
    }


def lost_by(
    plan: PruningPlan, activation_weight: Scores, architecture: Architecture
) -> dict[str, torch.Tensor]:
    """The share of each layer's written energy that a plan removes, by module: shape (layers,).

    It is the relative squared error of the unrepaired cut's output if channels are uncorrelated and
    have zero mean; correlations make the true error smaller or larger. For narrower heads it counts
    the dims of the values only, not what queries and keys lose.
    """
    written = written_energies(activation_weight)
    kept = kept_channels(plan, architecture)
    return {module: 1 - kept_share(written[module], kept[module]) for module in written}
