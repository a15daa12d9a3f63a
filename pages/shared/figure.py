"""A chart on the page, to be taken along as a picture and as a table."""

import pandas as pd
import plotly.graph_objects as go
import streamlit as st


def show(figure: go.Figure, key: str, frame: pd.DataFrame) -> None:
    """Draws a figure; its toolbar gives an SVG, the button below its numbers."""
    options = {"format": "svg", "filename": key}
    st.plotly_chart(figure, key=key, config={"toImageButtonOptions": options})
    st.download_button(
        "CSV", lambda: frame.to_csv(index=False).encode(), f"{key}.csv", "text/csv",
        key=f"csv-{key}", icon=":material/download:", type="tertiary", on_click="ignore",
    )  # fmt: skip
