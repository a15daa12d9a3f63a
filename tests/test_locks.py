"""Everything that is installed is pinned, and the locks are those of the requirements."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("app", "torch", "cuda", "tasks", "dev", "llama-cpp", "tune", "ray", "runtimes")
"""What shares one environment, .venv: no package twice."""
PLATFORMS = [
    {"sys_platform": system, "platform_system": name, "platform_machine": machine}
    for system, name, machine in (
        ("linux", "Linux", "x86_64"),
        ("linux", "Linux", "aarch64"),
        ("darwin", "Darwin", "arm64"),
    )
]


def entries(file: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a file, each with its hashes."""
    text = re.sub(r"\s#.*|^#.*", "", (ROOT / file).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (Requirement(line.partition("--hash")[0].strip()), re.findall(r"--hash=(\S+)", line))
        for line in filter(str.strip, lines)
    ]


def pins(*files: str) -> dict[str, str]:
    """Version by package."""
    return {
        canonicalize_name(requirement.name): str(requirement.specifier)
        for file in files
        for requirement, _ in entries(file)
    }


LOCKED = [f"locks/{name}.txt" for name in LOCKS]
TRANSFORMERS_4 = "locks/transformers-4.txt"
ASKED = [
    "requirements.txt",
    "requirements-tasks.txt",
    "requirements-dev.txt",
    "requirements-llama-cpp.txt",
    "requirements-tune.txt",
    "requirements-ray.txt",
    "requirements-runtimes.txt",
    "requirements-transformers-4.txt",
    "requirements-model.txt",
    "requirements-tools.txt",
    "benchmarks/requirements.txt",
]


@pytest.mark.parametrize("file", [*ASKED, *LOCKED, TRANSFORMERS_4])
def test_every_requirement_is_pinned(file):
    assert entries(file)
    for requirement, _ in entries(file):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert requirement.url is None


@pytest.mark.parametrize("file", ["requirements-model.txt", *LOCKED, TRANSFORMERS_4])
def test_every_installed_package_has_hashes(file):
    for requirement, hashes in entries(file):
        assert hashes, requirement
        for digest in hashes:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest), requirement
        assert len(set(hashes)) == len(hashes), requirement


def test_the_locks_agree_with_the_requirements():
    app, every = pins("locks/app.txt", "locks/torch.txt"), pins(*LOCKED)
    assert pins("requirements.txt").items() <= app.items()
    assert pins("requirements-tasks.txt") == pins("locks/tasks.txt")
    assert pins("requirements-dev.txt").items() <= every.items()
    assert pins("requirements-llama-cpp.txt").items() <= pins("locks/llama-cpp.txt").items()
    assert pins("requirements-tune.txt").items() <= pins("locks/tune.txt").items()
    assert pins("requirements-ray.txt").items() <= pins("locks/ray.txt").items()
    assert pins("requirements-runtimes.txt").items() <= every.items()
    assert sum(len(entries(file)) for file in LOCKED) == len(every), "a package is locked twice"


def test_the_folder_of_transformers_4_holds_only_other_versions():
    """It shares .venv's torch, and all else that both need in the same version."""
    own, shared = pins(TRANSFORMERS_4), pins(*LOCKED)
    assert pins("requirements-transformers-4.txt").items() <= own.items()
    assert own["transformers"].startswith("==4.57.")
    assert not own.items() & shared.items()
    assert set(own) <= set(shared), "it needs a package that .venv does not have"


def test_only_the_cuda_build_needs_what_is_cudas():
    assert set(pins("locks/torch.txt")) == {"torch"}
    others = ("app", "dev", "llama-cpp", "tune", "ray", "runtimes")
    names = pins(*(f"locks/{name}.txt" for name in others), TRANSFORMERS_4)
    assert not [name for name in names if re.match("nvidia|cuda|triton", name)]
    for requirement, _ in entries("locks/cuda.txt"):
        mac = {**default_environment(), **PLATFORMS[2]}
        assert requirement.marker, requirement
        assert not requirement.marker.evaluate(mac), requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform["platform_machine"])
def test_what_is_asked_for_is_locked_on_every_platform(platform, python):
    environment = {
        **default_environment(),
        **platform,
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    locked = {
        canonicalize_name(requirement.name)
        for file in ("locks/app.txt", "locks/torch.txt")
        for requirement, _ in entries(file)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    assert set(pins("requirements.txt")) <= locked


def test_licences_are_listed_for_what_is_locked():
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([\w.]+) \| (.+?) \|",
        (ROOT / "docs" / "licences.md").read_text(),
        re.MULTILINE,
    )
    listed = [(name, f"=={version}") for name, version, _ in rows if name != "package"]
    asked = pins("requirements-model.txt", "benchmarks/requirements.txt")
    locked = {**pins(*LOCKED), **asked}.items() | pins(TRANSFORMERS_4).items()
    assert sorted(listed) == sorted(locked)
