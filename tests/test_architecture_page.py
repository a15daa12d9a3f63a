"""docs/architecture.md lists what is there: every module of every room, and no other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LIBRARY = ROOT / "transact_core"


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below a heading, without its head."""
    _, _, section = PAGE.partition(f"\n## {heading}\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}


def rooms(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/__init__.py")}


LISTED = {quoted(room)[0]: quoted(listed) for room, _, listed in table("The rooms of the library")}


def test_the_rooms_of_the_library_are_listed():
    assert set(LISTED) == rooms(LIBRARY) | modules(LIBRARY)


@pytest.mark.parametrize("room", sorted(rooms(LIBRARY)))
def test_the_modules_of_a_room_are_listed_once_each(room):
    assert sorted(LISTED[room]) == sorted(modules(LIBRARY / room))


def test_the_rooms_of_the_pages_are_listed():
    listed = {quoted(room)[0] for room, _ in table("The rooms of the pages")}
    assert listed == {f"pages/{room}" for room in rooms(ROOT / "pages")} | {"pages/*.py"}


def test_the_pages_are_listed_with_their_charts_and_jobs():
    pages = ROOT / "pages"
    rows = table("The pages")
    assert {quoted(files)[0] for _, files, _, _ in rows} == {
        f"pages/{name}.py" for name in modules(pages)
    }
    for _, _, charts, jobs in rows:
        named = {name for name in quoted(charts) if not name.endswith(".py")}
        assert named <= modules(pages / "charts")
        assert set(quoted(jobs)) <= modules(pages / "server")


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`([\w/]+\.(?:py|js|json|toml|md))`", PAGE))
    written = {"compression.json", "report.json"}
    assert len(named - written) > 10
    for name in named - written:
        assert (ROOT / name).is_file() or (LIBRARY / name).is_file(), name


def test_the_family_that_was_added_last_is_shown_as_it_is():
    families = LIBRARY / "models" / "families"
    added = (families / "table.py").read_text(encoding="utf-8").partition("_MODULES = (")[2]
    last = added.partition(")")[0].split(", ")[-1]
    source = (families / f"{last}.py").read_text(encoding="utf-8")
    shown = PAGE.partition("```python\n")[2].partition("```")[0]
    assert source.endswith(f"\n\n{shown}")
