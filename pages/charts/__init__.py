"""From data to figures. Nothing here imports Streamlit."""
