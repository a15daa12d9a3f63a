"""Writes docs/licences.md: the licence that each locked package declares.

Run by `make licences`, with a version of pip that reads metadata without downloading packages.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "licences.md"
# By file: what its packages are for.
PURPOSES = {
    "locks/app.txt": "the app",
    "locks/torch.txt": "the app",
    "locks/cuda.txt": "torch's CUDA build",
    "locks/llama-cpp.txt": "the app's optional llama.cpp",
    "locks/tune.txt": "the app's optional LoRA",
    "locks/ray.txt": "the app's optional Ray",
    "locks/tasks.txt": "tasks",
    "locks/dev.txt": "the tests",
    "locks/runtimes.txt": "the tests of other runtimes",
    "locks/transformers-4.txt": "the tests of other runtimes",
    "requirements-model.txt": "the built-in model",
    "benchmarks/requirements.txt": "`make benchmark`",
}
# Files of direct requirements. All other locked packages are needed by these.
ASKED_FOR = (
    "requirements.txt",
    "requirements-tasks.txt",
    "requirements-dev.txt",
    "requirements-llama-cpp.txt",
    "requirements-tune.txt",
    "requirements-ray.txt",
    "requirements-runtimes.txt",
    "requirements-transformers-4.txt",
    "requirements-model.txt",
    "benchmarks/requirements.txt",
)
MAX_LICENCE_LENGTH = 80
"""Most characters of a licence's name. Longer metadata is the text of the licence."""
HEAD = """# Licences

What each package declares of itself in its metadata, written by `make licences`; versions are those
of [locks/](../locks). *Direct* is what the requirements files name; the rest is what that needs.
None of it is part of this repository, which is Apache-2.0.

| package | version | licence declared | | for |
| --- | --- | --- | --- | --- |
"""


def pins(file: str) -> list[tuple[str, str]]:
    """Name and version of each package in a lock file or a requirements file."""
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / file).read_text(), re.MULTILINE)
    return [(canonical(name), version) for name, version in lines]


def canonical(name: str) -> str:
    """The normalised spelling of a package's name, as PyPI writes it."""
    return re.sub(r"[-_.]+", "-", name.lower())


def declared(wanted: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The licence of each package and version, as pip reports it for this machine's builds.

    pip accepts one version of a package at a time, so further versions are requested separately.
    """
    first = dict(reversed(wanted))
    later = [package for package in wanted if package not in first.items()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--no-deps", "--quiet", "--report", str(report)]
        command += [f"{name}=={version}" for name, version in first.items()]
        subprocess.run(command, check=True)
        found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    # Builds from other indexes than PyPI have a local version, such as 2.13.0+cpu.
    licences = {
        (canonical(metadata["name"]), metadata["version"].partition("+")[0]): licence(metadata)
        for metadata in found
    }
    return licences | (declared(later) if later else {})


def licence(metadata: dict) -> str:
    """The name of the declared licence: an SPDX expression if there is one, else older fields."""
    if expression := metadata.get("license_expression"):
        return expression
    names = [
        classifier.rpartition(" :: ")[2]
        for classifier in metadata.get("classifier", ())
        if classifier.startswith("License ::")
    ]
    # Older packages have the name of the licence here, or its whole text.
    text = metadata.get("license", "").strip()
    if text and "\n" not in text and len(text) <= MAX_LICENCE_LENGTH and not names:
        return text
    if names == ["Other/Proprietary License"] and text and len(text) <= MAX_LICENCE_LENGTH:
        return f"{text} ({names[0]})"
    return ", ".join(names) or "none; see its files"


def main() -> None:
    direct = {package for file in ASKED_FOR for package in pins(file)}
    purposes: dict[tuple[str, str], str] = {}
    for file, purpose in PURPOSES.items():
        for package in pins(file):
            purposes.setdefault(package, purpose)
    licences = declared(list(purposes))
    lines = [
        f"| {package[0]} | {package[1]} | {licences[package]} "
        f"| {'direct' if package in direct else ''} | {purpose} |\n"
        for package, purpose in sorted(purposes.items())
    ]
    OUTPUT.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
