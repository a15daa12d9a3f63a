"""The table of trained cuts beside the dense model and the cuts that they came from."""

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from pages.parts.cut_picker import in_words
from pages.server.trainings import TrainingRun
from transact_core.base.errors import TransActError
from transact_core.data.corpus import short_name


def trained_frame(runs: Sequence[TrainingRun]) -> pd.DataFrame:
    """A row for each evaluation text of each training that is done."""
    rows = []
    for run in runs:
        try:
            record, _, texts = run.outcome
        except TransActError:
            continue
        rows += [
            {
                "which cut": in_words(run.cut),
                "trained on": short_name(record.text.source),
                "tokens": record.trained_tokens,
                "evaluation text": short_name(text.source),
                "dense": text.dense,
                "cut": text.cut,
                "trained": text.trained,
                "cut, × dense": text.cut / text.dense,
                "trained, × dense": text.trained / text.dense,
                "lost nats back": None if text.share_back is None else 100 * text.share_back,
            }
            for text in texts
        ]
    return pd.DataFrame(rows)


def trained_table(runs: Sequence[TrainingRun], with_cut: bool = True) -> None:
    """Perplexity of dense model, cut and trained cut on each evaluation text."""
    frame = trained_frame(runs)
    if not with_cut:
        frame = frame.drop(columns=["which cut", "trained on", "tokens"], errors="ignore")
    number = st.column_config.NumberColumn
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            **{name: number(format="%.2f") for name in ("dense", "cut", "trained")},
            **{name: number(format="%.3f") for name in ("cut, × dense", "trained, × dense")},
            "lost nats back": number(format="%.1f %%"),
        },
    )
    st.caption("Perplexity of the weights as they are saved, on texts that were not trained on.")
