"""The wheel: what `pip install .` installs, and whether the app starts from there."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from transact_core.models.load import BUILTIN_REQUIREMENT

ROOT = Path(__file__).parents[1]
SOURCES = ("transact_core", "pages", "assets", ".streamlit")
FILES = (
    "app.py",
    "setup.py",
    "pyproject.toml",
    "requirements.txt",
    "requirements-llama-cpp.txt",
    "requirements-ray.txt",
    "requirements-tune.txt",
    "LICENSE",
)
WAIT = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "secrets.toml")
        )
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", folder / "dist", folder],
        check=True,
        capture_output=True,
    )
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """A folder of packages with the wheel in it, as pip unpacks it."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_the_app_and_nothing_at_the_top_but_the_library(wheel: Path):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    app = "transact_core/_app/"
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "transact_core").rglob("*.py")}
    kinds = {".py", ".js", ".css", ".html"}
    expected |= {
        app + str(path.relative_to(ROOT))
        for path in (ROOT / "pages").rglob("*")
        if path.suffix in kinds
    }
    expected |= {f"{app}app.py", f"{app}.streamlit/config.toml"}
    expected |= {
        f"{app}assets/{name}" for name in ("example.json", "icon.svg", "logo.svg", "style.css")
    }
    assert packed == expected


def test_every_file_that_the_pages_read_is_of_a_kind_that_is_packed():
    kinds = {path.suffix for path in (ROOT / "pages").rglob("*") if path.is_file()}
    assert kinds - {".pyc"} <= {".py", ".js", ".css", ".html"}


def test_the_command_is_declared(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("entry_points.txt"))
        declared = archive.read(name).decode()
    assert re.search(r"^transact = transact_core\.__main__:main$", declared, re.MULTILINE)


def environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed)}


def test_the_first_page_is_drawn_from_there(installed: Path, tmp_path: Path):
    app = installed / "transact_core" / "_app"
    code = f"""
import sys
sys.path.insert(0, {str(app)!r})
from streamlit.testing.v1 import AppTest
from pages.server import libraries
import transact_core

assert transact_core.__file__.startswith({str(installed)!r}), transact_core.__file__
page = AppTest.from_file({str(app / "app.py")!r}, default_timeout=60).run()
assert not page.exception, page.exception
assert len(page.get("plotly_chart")) == 3
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_the_app_is_served_from_any_folder(installed: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A package of the same name in the folder that the user is in is not the app's.
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "__init__.py").write_text("raise ImportError('not the pages')\n")
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "transact_core", "app", "--port", str(port)],
            cwd=tmp_path,
            env=environment(installed),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        assert answers(f"http://localhost:{port}/_stcore/health", server), log.read_text()
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers(address: str, server: subprocess.Popen) -> bool:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).status == 200
        except OSError:
            time.sleep(0.1)
    return False


def start(*arguments: str, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "transact_core", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=WAIT,
    )


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1", "1_0"])
def test_a_port_that_is_none_is_refused_in_a_sentence(port: str):
    ran = start(f"--port={port}")
    assert ran.returncode == 2
    assert re.fullmatch(r"Error: .* is not a port, .*\n", ran.stderr), ran.stderr


def test_a_wrong_setting_keeps_the_app_from_starting():
    ran = start("--port=1", TRANSACT_ACCESS_TOKEN="short")
    assert ran.returncode == 2
    assert "TRANSACT_ACCESS_TOKEN has 5 characters" in ran.stderr


def test_the_missing_model_is_told_to_be_installed_as_the_requirements_have_it():
    text = (ROOT / "requirements-model.txt").read_text()
    assert f"\n{BUILTIN_REQUIREMENT} " in text
