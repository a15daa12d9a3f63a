"""Writes locks/: every installed package, with its version and the hashes of its files.

Run by `make lock`, which also installs uv. torch and the packages that only its CUDA build needs
have separate lock files, because builds of torch from other indexes have other hashes and needs.

The runtimes that exported models are tested in have separate lock files too. Each is installed into
a folder that comes before .venv's packages in the search path, so its lock file has only the
packages whose versions differ from the app's and the tests'.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
OLDEST_PYTHON = "3.11"
"""The locks are valid for this version of Python and later ones."""
CUDA_PACKAGE = re.compile(r"(nvidia|cuda|triton)(-|$)")
"""Names of packages that only the CUDA build of torch needs."""
OTHER_PLATFORM = re.compile(r"\S+ ; .*sys_platform == '(win32|emscripten)'")
"""Entries of packages that are only needed on platforms that the app does not support."""
ENTRY = r"^[^\s#].*(?:\n +.*)*"
"""An entry of a lock file: package, version and marker, followed by one line for each hash."""
EXTRA_TORCH_HASHES = (
    # CPU build for CPython 3.11 on Linux x86-64, which is not on PyPI.
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
)
"""SHA-256 of builds of the locked torch version that are accepted in addition to PyPI's."""


def compile_lock(requirements: list[str], preferred: str, *options: str) -> list[str]:
    """Resolves requirements files together, for Linux and macOS.

    `preferred` is the text of lock files, whose versions are kept where the requirements allow it;
    `options` are more options of `uv pip compile`.
    Returns one entry per package: its name, version, marker and hashes.
    """
    with tempfile.TemporaryDirectory() as folder:
        # uv keeps the versions that an existing output file has.
        output = Path(folder) / "lock.txt"
        output.write_text(preferred)
        command = ["uv", "pip", "compile", "--universal", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", "--quiet", "--python-version", OLDEST_PYTHON]
        command += ["--output-file", str(output), *options, *requirements]
        subprocess.run(command, cwd=ROOT, check=True)
        packages = re.findall(ENTRY, output.read_text(), re.MULTILINE)
    return [package for package in packages if not OTHER_PLATFORM.match(package)]


def package_name(package: str) -> str:
    return re.match(r"[a-z0-9-]+", package).group()


def pin(package: str) -> str:
    """`name==version` from an entry."""
    return package.split()[0]


def without(packages: list[str], others: list[str]) -> list[str]:
    """The entries of packages that `others` do not contain in the same version."""
    known = {pin(package) for package in others}
    return [package for package in packages if pin(package) not in known]


def write_lock(name: str, about: str, packages: list[str]) -> None:
    content = f"# {about}\n# Made by `make lock`.\n"
    (LOCKS / name).write_text(content + "".join(f"{package}\n" for package in packages))


def main() -> None:
    # Locked versions are kept unless an upgrade is requested.
    locked = {path.name: path.read_text() for path in sorted(LOCKS.glob("*.txt"))}
    if "--upgrade" in sys.argv:
        locked = {}
    own_of_4 = re.findall(ENTRY, locked.pop("transformers-4.txt", ""), re.MULTILINE)
    preferred = "".join(locked.values())

    app = compile_lock(["requirements.txt"], preferred)
    dev = compile_lock(["requirements.txt", "requirements-dev.txt"], preferred)
    if not set(app) <= set(dev):
        raise SystemExit("the tests' requirements change the app's; mend requirements-dev.txt")
    llama_cpp = compile_lock(["requirements.txt", "requirements-llama-cpp.txt"], preferred)
    if not set(app) <= set(llama_cpp):
        raise SystemExit("llama.cpp changes the app's packages; mend requirements-llama-cpp.txt")
    tune = compile_lock(["requirements.txt", "requirements-tune.txt"], preferred)
    if not set(app) <= set(tune):
        raise SystemExit("peft changes the app's packages; mend requirements-tune.txt")
    ray = compile_lock(["requirements.txt", "requirements-ray.txt"], preferred)
    if not set(app) <= set(ray):
        raise SystemExit("Ray changes the app's packages; mend requirements-ray.txt")
    runtimes = compile_lock(
        ["requirements.txt", "requirements-dev.txt", "requirements-runtimes.txt"], preferred
    )
    if not set(dev) <= set(runtimes):
        raise SystemExit("the runtimes change the app's packages; mend requirements-runtimes.txt")
    tasks = compile_lock(["requirements-tasks.txt"], preferred, "--no-deps")
    own_names = {package_name(package) for package in own_of_4}
    shared = [package for package in dev if package_name(package) not in own_names]
    transformers_4 = compile_lock(["requirements-transformers-4.txt"], "\n".join(own_of_4 + shared))

    cuda = [package for package in app if CUDA_PACKAGE.match(package_name(package))]
    torch = [package for package in app if package_name(package) == "torch"]
    rest = without(app, cuda + torch)
    LOCKS.mkdir(exist_ok=True)
    write_lock("app.txt", "All that the app needs but for torch.", rest)
    about = "lm_eval and what it imports beside app.txt; it declares more, which is not needed."
    write_lock("tasks.txt", about, without(tasks, runtimes))
    write_lock("dev.txt", "What `make test` needs on top.", without(dev, app))
    for digest in EXTRA_TORCH_HASHES:
        if digest not in torch[0]:
            torch[0] += f" \\\n    --hash=sha256:{digest}"
    write_lock("torch.txt", "torch from PyPI, and builds known besides.", torch)
    write_lock("cuda.txt", "What the CUDA build of torch needs, on Linux.", cuda)
    about = "The optional llama.cpp, on top of app.txt."
    write_lock("llama-cpp.txt", about, without(llama_cpp, app))
    about = "The optional LoRA of `tune`, on top of app.txt."
    write_lock("tune.txt", about, without(tune, app))
    about = "The optional curves on a Ray cluster, on top of app.txt."
    write_lock("ray.txt", about, without(ray, app))
    about = "The runtimes that exported models are tried in, on top of app.txt and dev.txt."
    write_lock("runtimes.txt", about, without(runtimes, dev))
    about = "transformers 4 and what it needs in other versions than app.txt and dev.txt have."
    write_lock("transformers-4.txt", about, without(transformers_4, dev))


if __name__ == "__main__":
    main()
