"""The TransAct workbench: page configuration, access, navigation, sidebar, and the page itself.

Nothing that this file imports brings torch with it. Importing torch and transformers takes seconds,
so that a server's first visitor sees the first page before these imports begin; see `libraries`.
"""

from pathlib import Path

import streamlit as st

from pages.parts.loading import show_loading
from pages.parts.login import require_access, show_exposure
from pages.parts.navigation import go_on, page_sections
from pages.server import libraries
from pages.server.visits import begin_visit, enter

ASSETS = Path(__file__).parent / "assets"

st.set_page_config(
    page_title="TransAct workbench", page_icon=str(ASSETS / "icon.svg"), layout="wide"
)
st.logo(str(ASSETS / "logo.svg"), size="large", icon_image=str(ASSETS / "icon.svg"))
enter()
sections = page_sections()
pages = [page for section in sections.values() for page in section]
user = require_access(pages)
# The configuration has it off until here, against a list of file names in the first second.
st.set_option("client.showSidebarNavigation", True)
page = st.navigation(sections, expanded=True)
st.html(ASSETS / "style.css")
go_on(pages)
if libraries.loaded():
    # Imported late, as torch comes with it.
    from pages.parts.sidebar import show_sidebar

    begin_visit(user)
    with st.sidebar:
        show_sidebar()
    show_exposure(user)
    page.run()
else:
    show_exposure(user)
    show_loading(page)
