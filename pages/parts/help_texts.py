"""Help texts of the controls that several pages share."""

from transact_core.importance.scores import IMPORTANCES

GRANULARITY_HELP = (
    "What is removed from the attention. `query-heads` removes the same number of query heads from "
    "every KV group and leaves the KV cache as it is; `kv-groups` removes whole groups, and the KV "
    "cache shrinks with them; `head-dims` makes every head narrower, and the KV cache with it; "
    "`auto` tries each on held-out calibration text and takes the best, which takes about three "
    "times as long to measure."
)
STEPS_HELP = (
    "How often units are scored anew on the model as pruned so far; each step takes about as long "
    "to measure as a cut."
)
SEQUENTIAL_HELP = (
    "Each module's units are chosen on the stream of the model as pruned and repaired before it; "
    "takes about three times as long to measure. With the importance `reconstruction`, a recovery, "
    "and one step."
)
RECOVERY_HELP = (
    "How the pruned model is repaired, without training, on the calibration text: `least-squares` "
    "fits `o_proj` and `down_proj` anew; `bias` adds the mean of the missing output as a bias, "
    "which adds parameters; `none` leaves the bare cut."
)
WIDTHS_HELP = (
    "How much each layer keeps. `uniform` keeps the same widths in every layer, and the folder "
    "loads in stock transformers; `allocated` gives each layer its own, as many heads and channels "
    "in all, where their loss hurts the predictions least; `traded` as many parameters in all, "
    "heads against channels. What each layer's cut loses is measured first, on held-out text, "
    "which takes about as long as several cuts. A bar that is dragged below replaces this choice."
)
KEEP_LAYERS_HELP = (
    "Layers that are not cut at all, counted from 0, with commas between them; the others then "
    "lose more. With the widths allocated or traded."
)
MULTIPLE_HELP = "The MLP's width is rounded to a multiple of this; runtimes like 8, 32, 64 or 256."
_MEASURES = {
    "activation": "how large a unit's activation is over the calibration text (TransAct)",
    "activation-weight": "how large a unit's output is: activation times output weights (Wanda)",
    "fluctuation": "how much a unit's output varies about its mean, which a bias could replace "
    "(FLAP)",
    "taylor": "how much the loss would change, to first order, without the unit's weights "
    "(LLM-Pruner)",
    "reconstruction": "the error that remains without the unit after the others are refitted by "
    "least squares (OBS pruning); best with the recovery `least-squares`",
    "magnitude": "how large the unit's weights are, without looking at any text; a baseline",
    "random": "nothing: units are removed at random; the baseline",
}


def measures(importance: str) -> str:
    """What an importance measures, in words that follow its name; its docstring's first line where
    the table has none."""
    line = _MEASURES.get(importance)
    if line is None:
        line = (IMPORTANCES[importance].__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return line


IMPORTANCE_HELP = "What decides which units go first. It measures\n\n" + "\n".join(
    f"- `{name}`: {measures(name)}" for name in IMPORTANCES
)
