"""Starts the app's server: the settings are checked first, then Streamlit runs app.py."""

from pathlib import Path

from streamlit import config
from streamlit.runtime.pages_manager import PagesManager
from streamlit.web import cli

from pages.server.settings import check


def serve(app: Path, address: str, port: int) -> int:
    """Serves app.py until it is stopped; returns the exit status, 2 where a setting is wrong."""
    # As `streamlit run` does, so that the check reads the secrets beside app.py too.
    config._main_script_path = str(app.resolve())
    if status := check(address):
        return status
    # app.py calls st.navigation. Until its first run, Streamlit would take the folder pages/ for
    # its older kind of app, in which a page's own address runs that page's file alone.
    PagesManager.uses_pages_directory = False
    options = {
        "server.address": address,
        "server.port": port,
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return cli.main(["run", str(app), *flags], prog_name="transact", standalone_mode=False) or 0
