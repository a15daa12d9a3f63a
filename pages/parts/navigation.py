"""Which pages there are, in the order in which one asks, and links from one to another."""

from collections.abc import Iterable

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from pages.server.visits import WANTED

SECTIONS = {
    "": {
        "start": ("Start here", ":material/flag:"),
        "method": ("Method", ":material/functions:"),
    },
    "See the waste": {
        "activations": ("Activations", ":material/show_chart:"),
        "premise": ("Premise", ":material/science:"),
        "importance": ("Importance", ":material/grid_on:"),
        "heads": ("Heads", ":material/visibility:"),
        "redundancy": ("Redundancy", ":material/balance:"),
    },
    "Decide": {"compress": ("Compress", ":material/compress:")},
    "Measure": {
        "perplexity": ("Perplexity", ":material/trending_up:"),
        "compare": ("Compare", ":material/compare:"),
        "latency": ("Latency", ":material/timer:"),
    },
    "Take away": {"export": ("Export", ":material/download:")},
}
"""Title and icon by file name, by section. The first page is shown at the bare address."""
FIRST = "start"
"""The page at the bare address. It is drawn before torch is imported, so it imports none of it."""


def page_sections() -> dict[str, list[StreamlitPage]]:
    """For `st.navigation`."""
    sections = {
        section: [
            # What tells pages apart is the address that they would have.
            st.Page(
                f"pages/{name}.py",
                title=title,
                icon=icon,
                url_path="bare-address" if name == FIRST else None,
                default=name == FIRST,
            )
            for name, (title, icon) in members.items()
        ]
        for section, members in SECTIONS.items()
    }
    # Streamlit knows the first page at the bare address only, and says of its name that there is no
    # such page.
    title, icon = SECTIONS[""][FIRST]
    sections[""].append(
        st.Page(_first, title=title, icon=icon, url_path=FIRST, visibility="hidden")
    )
    return sections


def drawn_before_libraries(page: StreamlitPage) -> bool:
    """Whether a page draws itself without what `pages.server.libraries` imports."""
    return page.title == SECTIONS[""][FIRST][0]


def _first() -> None:
    st.switch_page(f"pages/{FIRST}.py", query_params=st.query_params.to_dict())


def go_on(pages: Iterable[StreamlitPage]) -> None:
    """Goes to the page that a visitor came for who was led here from it; see `visit`."""
    wanted = st.query_params.pop(WANTED, None)
    for page in pages:
        if page.url_path == wanted:
            st.switch_page(page, query_params=st.query_params.to_dict())


def link(name: str, label: str = "", **query: object) -> None:
    """A link to a page, by its file's name; it opens with this in its address."""
    title, icon = next(members[name] for members in SECTIONS.values() if name in members)
    st.page_link(
        f"pages/{name}.py",
        label=label or title,
        icon=icon,
        query_params={key: str(value) for key, value in query.items()},
    )
