"""The pages of the app in the order of the navigation, and links from one page to another."""

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
    "Decide": {
        "compress": ("Compress", ":material/compress:"),
        "recover": ("Recover", ":material/healing:"),
    },
    "Measure": {
        "perplexity": ("Perplexity", ":material/trending_up:"),
        "tasks": ("Tasks", ":material/quiz:"),
        "damage": ("Token damage", ":material/format_color_text:"),
        "compare": ("Compare", ":material/compare:"),
        "latency": ("Latency", ":material/timer:"),
    },
    "Take away": {
        "deploy": ("Deploy", ":material/smartphone:"),
        "export": ("Export", ":material/download:"),
    },
}
"""Title and icon by file name, by section. The first page is shown at the bare address."""
FIRST = "start"
"""The page at the bare address. It is drawn before torch is imported, so it imports none of it."""


def page_sections() -> dict[str, list[StreamlitPage]]:
    """For `st.navigation`."""
    sections = {
        section: [
            # Streamlit tells pages apart by their addresses, so this one needs one of its own too.
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
    # Streamlit serves the default page at the bare address only, and calls `/start` no page at all.
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
    """Goes to the page that the visitor asked for and was led here from; see `require_entered`."""
    wanted = st.query_params.pop(WANTED, None)
    for page in pages:
        if page.url_path == wanted:
            st.switch_page(page, query_params=st.query_params.to_dict())


def link(name: str, label: str = "", **query: object) -> None:
    """A link to a page, by the name of its file, with a query for its address."""
    title, icon = next(members[name] for members in SECTIONS.values() if name in members)
    st.page_link(
        f"pages/{name}.py",
        label=label or title,
        icon=icon,
        query_params={key: str(value) for key, value in query.items()},
    )
