"""What the environment may say, and that no path from the browser leaves the folders it names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit import get_option

from pages.server.settings import (
    NAMES,
    exposure,
    is_loopback,
    own_folder,
    read_settings,
    require_readable,
    require_readable_source,
    require_readable_text,
    require_writable,
    uploads_folder,
)
from transact_core.base.errors import TransActError
from transact_core.data.corpus import file_and_column

ROOT = Path(__file__).parents[3]
TOKEN = "correct horse battery"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An allowed folder beside a secret one, with links of every kind between them."""
    root = tmp_path_factory.mktemp("tree").resolve()
    allowed, secret = root / "allowed", root / "secret"
    (allowed / "model" / "deep").mkdir(parents=True)
    secret.mkdir()
    (root / "allowed-too").mkdir()
    (secret / "model.gguf").write_text("secret")
    (allowed / "out").symlink_to(secret)
    (allowed / "up").symlink_to("..")
    (allowed / "file.gguf").symlink_to(secret / "model.gguf")
    (allowed / "round").symlink_to("round")
    (secret / "back").symlink_to(allowed / "model")
    return root


@pytest.fixture(scope="module")
def bounded(tree):
    folder = str(tree / "allowed")
    return read_settings(
        {"TRANSACT_READ_FOLDERS": folder, "TRANSACT_WRITE_FOLDERS": folder}, "localhost"
    )


def test_alone_on_this_machine_home_and_the_working_folder_are_open():
    usual = read_settings({}, "localhost")
    assert usual.read_folders == usual.write_folders
    assert set(usual.read_folders) == {Path.home().resolve(), Path.cwd().resolve()}
    assert not usual.controlled
    assert exposure(usual) is None


@pytest.mark.parametrize(
    ("address", "environment", "login"),
    [
        ("0.0.0.0", {}, False),
        ("::", {}, False),
        (None, {}, False),
        ("192.168.0.7", {}, False),
        ("unix:///run/app", {}, False),
        ("localhost", {"TRANSACT_USER_HEADER": "X-Forwarded-User"}, False),
        ("localhost", {}, True),
    ],
)
def test_where_others_may_come_only_a_folder_of_its_own_is_open(address, environment, login):
    served = read_settings(environment, address, login)
    assert served.read_folders == served.write_folders == (own_folder().resolve(),)
    assert served.export_folder == own_folder()


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_addresses_of_this_machine(address):
    assert is_loopback(address)


@pytest.mark.parametrize("address", [None, "", "0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_addresses_that_others_reach(address):
    assert not is_loopback(address)


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"TRANSACT_READ_FOLDERS": "/no/such/folder"}, "READ_FOLDERS names '/no/such/folder'"),
        ({"TRANSACT_WRITE_FOLDERS": "here"}, "WRITE_FOLDERS names 'here'"),
        ({"TRANSACT_READ_FOLDERS": "~nobody-of-that-name"}, "READ_FOLDERS names"),
        ({"TRANSACT_UPLOADS_MB": "0"}, "UPLOADS_MB is '0'"),
        ({"TRANSACT_UPLOADS_MB": "1e3"}, "whole number of megabytes"),
        ({"TRANSACT_UNASKED_SECONDS": "-1"}, "whole number of seconds, from 0"),
        ({"TRANSACT_CACHE_GB": "much"}, "CACHE_GB is .much."),
        ({"TRANSACT_ACCESS_TOKEN": "short"}, "at least 16"),
        ({"TRANSACT_ACCESS_TOKEN": ""}, "at least 16"),
        ({"TRANSACT_USER_HEADER": ""}, "no header's name"),
        ({"TRANSACT_USER_HEADER": "X-User: me"}, "no header's name"),
        ({"TRANSACT_USERS": "ann"}, "nothing says who comes"),
        ({"TRANSACT_USERS": ", ", "TRANSACT_USER_HEADER": "X-User"}, "names nobody"),
        ({"TRANSACT_ACESS_TOKEN": TOKEN}, "TRANSACT_ACCESS_TOKEN is meant"),
        ({"TRANSACT_READ_FOLDER": "/"}, "TRANSACT_READ_FOLDERS is meant"),
    ],
)
def test_a_wrong_setting_is_said_in_a_sentence(environment, complaint):
    with pytest.raises(TransActError, match=complaint) as refused:
        read_settings(environment, "localhost")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("option", ["enableXsrfProtection", "enableCORS"])
def test_streamlits_protection_is_on(option):
    assert get_option(f"server.{option}") is True


def test_an_empty_list_of_folders_opens_none(tmp_path):
    shut = read_settings({"TRANSACT_READ_FOLDERS": "", "TRANSACT_WRITE_FOLDERS": ""}, "localhost")
    for require in (require_readable, require_writable):
        with pytest.raises(TransActError, match="allows no folder"):
            require(tmp_path / "x", shut)


def test_the_token_is_in_no_printout():
    assert TOKEN not in repr(read_settings({"TRANSACT_ACCESS_TOKEN": TOKEN}, "localhost"))


def test_a_server_that_others_reach_says_what_that_exposes(tmp_path):
    environment = {"TRANSACT_READ_FOLDERS": str(tmp_path), "TRANSACT_WRITE_FOLDERS": str(tmp_path)}
    told = exposure(read_settings(environment, "0.0.0.0"))
    assert str(tmp_path) in told
    assert "Nothing is asked" in told
    told = exposure(read_settings({**environment, "TRANSACT_ACCESS_TOKEN": TOKEN}, "0.0.0.0"))
    assert "Nothing is asked" not in told
    assert TOKEN not in told


@pytest.mark.parametrize(
    "path",
    [
        "{allowed}/../secret/model.gguf",
        "{allowed}/out/model.gguf",
        "{allowed}/file.gguf",
        "{allowed}/up/secret",
        "{allowed}/round/model",
        "{allowed}-too",
        "{allowed}",
        "/etc/passwd",
        "/proc/self/environ",
        "~/.ssh",
        "~root/x",
        "..",
        "",
        "a\0b",
        "/" + "a/" * 5000,
    ],
)
def test_ways_out_are_refused(tree, bounded, path):
    path = path.format(allowed=tree / "allowed")
    with pytest.raises(TransActError) as refused:
        require_writable(path, bounded)
    assert "secret/" not in str(refused.value).replace(path, "")
    if path != str(tree / "allowed"):
        with pytest.raises(TransActError):
            require_readable(path, bounded)


def test_a_refusal_names_the_setting_and_not_what_is_there(tree, bounded):
    there, missing = tree / "secret" / "model.gguf", tree / "secret" / "missing"
    words = []
    for path in (there, missing):
        with pytest.raises(TransActError, match="TRANSACT_READ_FOLDERS") as refused:
            require_readable(path, bounded)
        words.append(str(refused.value).replace(str(path), "PATH"))
    assert words[0] == words[1]


def test_links_into_an_allowed_folder_lead_there(tree, bounded):
    assert require_readable(tree / "secret" / "back", bounded) == tree / "allowed" / "model"
    assert require_writable(tree / "allowed/up/allowed/new", bounded) == tree / "allowed" / "new"


def test_home_is_what_the_tilde_means(monkeypatch, tree):
    monkeypatch.setenv("HOME", str(tree / "allowed"))
    mine = read_settings({"TRANSACT_READ_FOLDERS": "~"}, "0.0.0.0")
    assert require_readable("~/model", mine) == tree / "allowed" / "model"


pieces = st.sampled_from(
    ["allowed", "secret", "model", "deep", "out", "up", "back", "new", "..", ".", "", "~", "a b"]
)


@given(start=st.sampled_from(["/", "", "~", "~/", "//"]), parts=st.lists(pieces, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_let_through_lies_inside(tree, bounded, monkeypatch, start, parts):
    monkeypatch.setenv("HOME", str(tree / "allowed"))
    monkeypatch.chdir(tree / "secret")
    for prefix in (start, f"{tree}/", f"{tree}/allowed/"):
        path = prefix + "/".join(parts)
        for require in (require_readable, require_writable):
            try:
                place = require(path, bounded)
            except TransActError:
                continue
            # As all that opens a path here does; `os.path` takes the tilde of ./~ for a name.
            inside = os.path.realpath(Path(path).expanduser())
            assert str(place) == inside
            assert (inside + "/").startswith(f"{tree}/allowed/")


def test_only_sources_that_are_paths_are_held_to_folders(tree, bounded, monkeypatch):
    monkeypatch.chdir(tree)
    hub = ("builtin", "owner/name", "gpt2", "hub:wikitext", "hub:owner/name:config:test:text")
    for source in (*hub, str(tree / "allowed" / "model"), str(uploads_folder() / "ab" / "x.txt")):
        require_readable_source(source, bounded)
    # What looks like a hub's name is a folder here, and would be taken for one.
    paths = ("secret", "secret/model.gguf", "hub:secret", "hub:secret/model.gguf:x", "hub:/etc")
    for source in (*paths, "hub:../secret", "/etc", " /etc/passwd ", "~/x", "", "hub:"):
        with pytest.raises(TransActError):
            require_readable_source(source, bounded)


def test_every_text_of_a_mix_is_held_to_folders(tree, bounded, monkeypatch):
    """The mix as a whole may look like a path in an allowed folder."""
    monkeypatch.chdir(tree / "allowed")
    inside, outside = tree / "allowed" / "x.txt", tree / "secret" / "x.txt"
    for path in (inside, outside):
        path.write_text("text")
    require_readable_text(f"builtin+{inside}+generated:100:1+hub:wikitext", bounded)
    for source in (f"builtin+{outside}", f"{inside}+../secret/x.txt", f"x.txt+{outside}"):
        with pytest.raises(TransActError):
            require_readable_text(source, bounded)


def test_a_column_of_a_file_is_held_to_the_folder_of_the_file(tree, bounded):
    for folder in ("allowed", "secret"):
        (tree / folder / "rows.jsonl").write_text('{"a": "b"}')
    require_readable_source(str(tree / "allowed" / "rows.jsonl:a"), bounded)
    with pytest.raises(TransActError):
        require_readable_source(str(tree / "secret" / "rows.jsonl:a"), bounded)
    # As a path this lies in the allowed folder; then it names no column of the other one.
    around = str(tree / "secret" / "rows.jsonl:" / ".." / ".." / "allowed" / "x")
    require_readable_source(around, bounded)
    assert file_and_column(around) == (Path(around), None)


@pytest.mark.parametrize(("address", "code"), [("localhost", 0), ("0.0.0.0", 0), ("", 2)])
def test_the_check_before_the_server_starts(address, code):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    if code:
        environment["TRANSACT_ACCESS_TOKEN"] = "short"
    command = [sys.executable, "-m", "pages.server.settings", address]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert ("Nothing is asked" in done.stderr) == (address == "0.0.0.0")
    assert ("error: TRANSACT_ACCESS_TOKEN" in done.stderr) == bool(code)
    assert "Traceback" not in done.stderr
