"""Functions from data to Plotly figures. Nothing here imports Streamlit."""
