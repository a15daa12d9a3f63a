"""Width pruning of language models guided by their transitional activations.

Its sub-packages are listed in `ROOMS` in the order in which data flows through them; each imports
only from those before it, and the command line `cli` from all. `docs/architecture.md` is the map.

The method is TransAct: Shen et al., "Pruning Large Language Models to Intra-module Low-rank
Architecture with Transitional Activations", Findings of ACL 2024, arXiv 2407.05690.
"""

__version__ = "0.4.0"
ROOMS = (
    "base",
    "models",
    "data",
    "forward",
    "importance",
    "pruning",
    "training",
    "planning",
    "experiments",
    "export",
    "workers",
)
