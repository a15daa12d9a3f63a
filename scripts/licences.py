"""Writes docs/licences.md: every package that is locked, with the licence that it declares.

Run by `make licences`, with a pip that reads metadata without fetching the packages.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "licences.md"
PURPOSES = {
    "locks/app.txt": "the app",
    "locks/torch.txt": "the app",
    "locks/cuda.txt": "torch's CUDA build",
    "locks/dev.txt": "the tests",
    "requirements-model.txt": "the built-in model",
    "benchmarks/requirements.txt": "`make benchmark`",
}
ASKED_FOR = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-model.txt",
    "benchmarks/requirements.txt",
)
LONGEST = 80
HEAD = """# Licences

What each package declares of itself in its metadata, written by `make licences`; versions are those
of [locks/](../locks). *Direct* is what the requirements files name; the rest is what that needs.
None of it is part of this repository, which is Apache-2.0.

| package | version | licence declared | | for |
| --- | --- | --- | --- | --- |
"""


def pins(file: str) -> dict[str, str]:
    """Version by name."""
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name.lower()): version for name, version in lines}


def declared(wanted: list[str]) -> dict[str, str]:
    """The licence by package, as pip reports it for this machine's builds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--no-deps", "--quiet", "--report", str(report), *wanted]
        subprocess.run(command, check=True)
        found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", each["name"].lower()): licence(each) for each in found}


def licence(metadata: dict) -> str:
    if expression := metadata.get("license_expression"):
        return expression
    classifiers = [each for each in metadata.get("classifier", ()) if each.startswith("License ::")]
    names = [each.rpartition(" :: ")[2] for each in classifiers]
    # Older packages put the whole text of the licence here.
    text = metadata.get("license", "").strip()
    if text and "\n" not in text and len(text) <= LONGEST and not names:
        return text
    if names == ["Other/Proprietary License"] and text and len(text) <= LONGEST:
        return f"{text} ({names[0]})"
    return ", ".join(names) or "none; see its files"


def main() -> None:
    direct = {name for file in ASKED_FOR for name in pins(file)}
    rows = {}
    for file, purpose in PURPOSES.items():
        for name, version in pins(file).items():
            rows.setdefault(name, (version, purpose))
    licences = declared([f"{name}=={version}" for name, (version, _) in rows.items()])
    lines = [
        f"| {name} | {version} | {licences[name]} | {'direct' if name in direct else ''} "
        f"| {purpose} |\n"
        for name, (version, purpose) in sorted(rows.items())
    ]
    OUTPUT.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
