"""What `transact_core/__init__.py` says of the order of its modules."""

import ast
import re
from pathlib import Path

import transact_core

FOLDER = Path(transact_core.__file__).parent
ORDER = [
    name.strip()
    for names in re.findall(r"^ {4}([a-z, ]+?) {2,}\S", transact_core.__doc__, re.MULTILINE)
    for name in names.split(",")
]


def _imports(name: str) -> set[str]:
    """Modules of the library that this one imports."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    froms = (node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {each.partition(".")[2] for each in froms if each.startswith("transact_core.")}


def test_all_modules_are_listed_once():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(ORDER) == sorted(files)


def test_a_module_imports_only_from_those_before_it():
    for place, name in enumerate(ORDER):
        assert _imports(name) <= set(ORDER[:place]), name
