"""Writes locks/: every package that is installed, with its version and the hashes of its files.

Run by `make lock`, with the uv that it installs. torch and what only its CUDA build needs have
locks of their own: another build of torch, from another index, has other hashes and other needs.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
OLDEST_PYTHON = "3.11"
OF_CUDA = re.compile(r"(nvidia|cuda|triton)(-|$)")
OF_NO_PLATFORM_HERE = re.compile(r"\S+ ; .*sys_platform == '(win32|emscripten)'")
KNOWN_BUILDS = (
    # CPython 3.11, Linux x86-64, CPU, which is not on PyPI.
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
)


def compile_lock(*arguments: str) -> list[str]:
    """The packages for Linux and macOS, each with its version and hashes."""
    command = ["uv", "pip", "compile", "--universal", "--generate-hashes", "--no-header"]
    command += ["--no-annotate", "--quiet", "--python-version", OLDEST_PYTHON, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    packages = re.findall(r"^\S.*(?:\n +.*)*", done.stdout, re.MULTILINE)
    return [package for package in packages if not OF_NO_PLATFORM_HERE.match(package)]


def name_of(package: str) -> str:
    return re.match(r"[a-z0-9-]+", package).group()


def write(name: str, about: str, packages: list[str]) -> None:
    content = f"# {about}\n# Made by `make lock`.\n" + "".join(f"{each}\n" for each in packages)
    (LOCKS / name).write_text(content)


def main() -> None:
    # Versions stay as they are locked unless an upgrade is asked for.
    before = [str(path) for path in sorted(LOCKS.glob("*.txt"))]
    if "--upgrade" in sys.argv:
        before = []
    preferences = [part for path in before for part in ("--constraints", path)]
    app = compile_lock("requirements.txt", *preferences)
    every = compile_lock("requirements.txt", "requirements-dev.txt", *preferences)
    if not set(app) <= set(every):
        raise SystemExit("the tests' requirements change the app's; mend requirements-dev.txt")
    cuda = [package for package in app if OF_CUDA.match(name_of(package))]
    torch = [package for package in app if name_of(package) == "torch"]
    rest = [package for package in app if package not in cuda + torch]
    LOCKS.mkdir(exist_ok=True)
    write("app.txt", "All that the app needs but for torch.", rest)
    write("dev.txt", "What `make test` needs on top.", [each for each in every if each not in app])
    known = "".join(f" \\\n    --hash=sha256:{digest}" for digest in KNOWN_BUILDS)
    write("torch.txt", "torch from PyPI, and builds known besides.", [torch[0] + known])
    write("cuda.txt", "What the CUDA build of torch needs, on Linux.", cuda)


if __name__ == "__main__":
    main()
