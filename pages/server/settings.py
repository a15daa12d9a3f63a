"""Settings of the app's server: folders, uploads, access. They do not bind the command line.

They are environment variables named `TRANSACT_…`, which SECURITY.md lists. They are read once, and
a wrong one keeps the app from starting, with one sentence on what is wrong. Paths from the browser
are used only after `require_readable`, `require_readable_source`, `require_readable_text` or
`require_writable`.
"""

import ipaddress
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import streamlit as st

from transact_core.base.errors import TransActError
from transact_core.base.files import CACHE_LIMIT, cache_folder, cache_limit_bytes

PREFIX = "TRANSACT_"
READ, WRITE = "TRANSACT_READ_FOLDERS", "TRANSACT_WRITE_FOLDERS"
UPLOADS_MB, UNASKED = "TRANSACT_UPLOADS_MB", "TRANSACT_UNASKED_SECONDS"
TOKEN, USER_HEADER, USERS = "TRANSACT_ACCESS_TOKEN", "TRANSACT_USER_HEADER", "TRANSACT_USERS"
CACHE, RAY = "TRANSACT_CACHE", "TRANSACT_RAY"
NAMES = (READ, WRITE, UPLOADS_MB, UNASKED, TOKEN, USER_HEADER, USERS, CACHE, CACHE_LIMIT, RAY)
UPLOADS_MB_USUAL, UNASKED_USUAL = 1024, 60
SHORTEST_TOKEN = 16
"""Characters of an access token; so many cannot be guessed through the form."""
LONGEST_PATH = 4096
"""Characters of a path from the browser."""
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Settings:
    """What the server allows."""

    address: str | None
    """Where it listens; None is every address."""
    read_folders: tuple[Path, ...]
    write_folders: tuple[Path, ...]
    uploads_mb: int = UPLOADS_MB_USUAL
    unasked_seconds: int = UNASKED_USUAL
    """The longest estimate of work in the background that begins without being asked for."""
    access_token: str | None = field(default=None, repr=False)
    user_header: str | None = None
    login: bool = False
    """Whether Streamlit's own OIDC login is set up."""
    users: frozenset[str] | None = None
    """Users who may come in, of those whom the header or the login names; None is all of them."""
    ray: str | None = None
    """Address of the Ray cluster that measures curves; None where this machine does."""

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.address)

    @property
    def controlled(self) -> bool:
        """Whether visitors must show a token, a header of a proxy, or a login."""
        return bool(self.access_token or self.user_header or self.login)

    @property
    def export_folder(self) -> Path:
        """Where checkpoints go unless another folder is named."""
        usual = own_folder()
        allowed = any(usual.resolve().is_relative_to(folder) for folder in self.write_folders)
        return usual if allowed or not self.write_folders else self.write_folders[0]


def own_folder() -> Path:
    """The one folder that the browser may use by default on a server that others may reach."""
    return Path.home() / "transact"


def is_loopback(address: str | None) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address or "0.0.0.0").is_loopback
    except ValueError:
        return False


def read_settings(
    environment: Mapping[str, str], address: str | None, login: bool = False
) -> Settings:
    """Settings from the environment, for a server at an address, with Streamlit's login or not.

    Raises:
        TransActError: the value of a setting cannot be used.
    """
    for name in environment:
        suffix = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and name not in NAMES:
            known = [known_name.removeprefix(PREFIX) for known_name in NAMES]
            if near := get_close_matches(suffix, known, n=1, cutoff=0.7):
                raise TransActError(f"There is no setting {name}; {PREFIX}{near[0]} is meant.")
    cache_limit_bytes(environment)
    token = environment.get(TOKEN)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise TransActError(
            f"{TOKEN} has {len(token)} characters; it takes at least {SHORTEST_TOKEN}, as "
            "`python3 -c 'import secrets; print(secrets.token_urlsafe())'` makes them."
        )
    header = environment.get(USER_HEADER)
    if header is not None and not re.fullmatch(r"[A-Za-z0-9-]+", header):
        raise TransActError(
            f"{USER_HEADER} is {header!r}, which is no header's name; set it to the one that your "
            "proxy sends, as X-Forwarded-User."
        )
    users = environment.get(USERS)
    if users is not None and header is None and not login:
        raise TransActError(
            f"{USERS} says who may come in and nothing says who comes: set {USER_HEADER}, or "
            "Streamlit's login in .streamlit/secrets.toml."
        )
    allowed = None if users is None else frozenset(filter(None, map(str.strip, users.split(","))))
    if allowed is not None and not allowed:
        raise TransActError(f"{USERS} names nobody; name users, separated by commas, or unset it.")
    # A proxy or a login is there for others, wherever the server itself listens.
    alone = is_loopback(address) and header is None and not login
    usual = (Path.home(), Path.cwd()) if alone else (own_folder(),)
    return Settings(
        address,
        _folders(environment, READ, usual),
        _folders(environment, WRITE, usual),
        _whole_number(environment, UPLOADS_MB, UPLOADS_MB_USUAL, 1, "megabytes"),
        _whole_number(environment, UNASKED, UNASKED_USUAL, 0, "seconds"),
        token,
        header,
        login,
        allowed,
        _cluster(environment),
    )


def _folders(
    environment: Mapping[str, str], name: str, usual: tuple[Path, ...]
) -> tuple[Path, ...]:
    """The folders that a setting names, resolved, each once. A setting that is empty names none."""
    if (value := environment.get(name)) is None:
        return tuple(dict.fromkeys(folder.resolve() for folder in usual))
    folders = []
    for part in filter(None, value.split(os.pathsep)):
        try:
            folder = Path(part).expanduser()
            if not folder.is_absolute() or not folder.is_dir():
                raise TransActError(
                    f"{name} names {part!r}, which is no folder of this machine by its full path; "
                    f"make it or name others, separated by {os.pathsep!r}."
                )
            folders.append(folder.resolve())
        except (OSError, RuntimeError, ValueError):
            raise TransActError(f"{name} names {part!r}, which cannot be looked at.") from None
    return tuple(dict.fromkeys(folders))


def _whole_number(
    environment: Mapping[str, str], name: str, usual: int, least: int, unit: str
) -> int:
    value = environment.get(name, str(usual))
    # int() would take signs, underscores and numbers of thousands of digits too.
    if not re.fullmatch(r"0*[0-9]{1,9}", value, re.ASCII) or int(value) < least:
        raise TransActError(
            f"{name} is {value!r}; it takes a whole number of {unit}, from {least}."
        )
    return int(value)


def _cluster(environment: Mapping[str, str]) -> str | None:
    """The address of a Ray cluster, as `sweep --ray` takes it."""
    value = environment.get(RAY)
    if value is not None and not re.fullmatch(r"auto|local|[\w.\[\]:-]+:[0-9]+", value, re.ASCII):
        raise TransActError(
            f"{RAY} is {value!r}; it takes auto, for the Ray cluster that this machine is a node "
            "of, local, for this machine alone, or the cluster's HOST:PORT."
        )
    return value


def login_configured() -> bool:
    """Whether the secrets of Streamlit set up its OIDC login.

    Raises:
        TransActError: there is a file of secrets that cannot be read.
    """
    if st.secrets.load_if_toml_exists():
        return "auth" in st.secrets
    for path in st.get_option("secrets.files"):
        if os.path.lexists(path):
            raise TransActError(f"{path} cannot be read as TOML; mend it or remove it.")
    return False


@st.cache_resource(show_spinner=False)
def _read_once(address: str | None) -> Settings:
    read = read_settings(os.environ, address, login_configured())
    if exposed := exposure(read):
        logging.getLogger(__name__).warning(exposed)
    return read


def settings() -> Settings:
    """The settings of this server; what it exposes is logged when they are first read."""
    return _read_once(st.get_option("server.address"))


# --- paths from the browser ------------------------------------------------------------------


def uploads_folder() -> Path:
    return cache_folder() / "uploads"


def resolved(path: Path | str) -> Path:
    """The absolute path that a path from the browser leads to, links and `..` followed.

    Raises:
        TransActError: it is no path, or its links form a circle.
    """
    try:
        if len(str(path)) > LONGEST_PATH:
            raise ValueError
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        raise TransActError(f"{str(path)[:200]!r} is no path of this machine.") from None


def require_readable(path: Path | str, allowed: Settings) -> Path:
    """The resolved path, which lies in a folder that the browser may read.

    Raises:
        TransActError: it lies elsewhere. Whether it exists is not revealed.
    """
    place = resolved(path)
    if not _within(place, (*allowed.read_folders, uploads_folder().resolve())):
        raise TransActError(_refusal(path, "read", READ, allowed.read_folders))
    return place


def require_writable(path: Path | str, allowed: Settings) -> Path:
    """The resolved path, which lies below a folder that the browser may write.

    Not the folder itself: an output is staged beside its place and renamed.

    Raises:
        TransActError: it lies elsewhere.
    """
    place = resolved(path)
    if place in allowed.write_folders or not _within(place, allowed.write_folders):
        raise TransActError(_refusal(path, "written", WRITE, allowed.write_folders))
    return place


def require_readable_source(source: str, allowed: Settings) -> None:
    """Refuses a model or a text whose name is a path out of what the browser may read.

    Raises:
        TransActError: it is one.
    """
    # Imported late: these bring torch with them, and the first page is drawn before that.
    from transact_core.data.corpus import BUILTIN_TEXTS, file_and_column
    from transact_core.models.load import BUILTIN

    source = source.strip()
    if source in (BUILTIN, *BUILTIN_TEXTS):
        return
    if source.startswith("hub:"):
        source = source.removeprefix("hub:").partition(":")[0]
    path, column = file_and_column(source)
    if column is not None:
        source = str(path)
    # The libraries that fetch from the hub take a folder of the same name where there is one.
    if not (HUB_NAME.fullmatch(source) and not os.path.lexists(source)):
        require_readable(source, allowed)


def require_readable_text(source: str, allowed: Settings) -> None:
    """Like `require_readable_source`, for a text: each one of a mix must be readable.

    Raises:
        TransActError: one is a path out of what the browser may read.
    """
    from transact_core.data.corpus import is_generated, mixed_sources

    for part in mixed_sources(source):
        # What a model writes is read from no path that a visitor names.
        if not is_generated(part):
            require_readable_source(part, allowed)


def _within(place: Path, folders: tuple[Path, ...]) -> bool:
    return any(place.is_relative_to(folder) for folder in folders)


def _refusal(path: Path | str, verb: str, name: str, folders: tuple[Path, ...]) -> str:
    where = " and ".join(map(str, folders)) or "no folder"
    return (
        f"{path} may not be {verb} from the browser: {name} allows {where}; name a folder below, "
        "or have whoever runs the server set it."
    )


# --- what a server lets others do ------------------------------------------------------------


def exposure(allowed: Settings) -> str | None:
    """What a server that listens beyond its own machine exposes, or None for one that does not."""
    if allowed.local:
        return None
    reads = " and ".join(map(str, allowed.read_folders)) or "no folder"
    writes = " and ".join(map(str, allowed.write_folders)) or "no folder"
    exposed = (
        f"This app listens beyond its own machine, at {allowed.address or 'every address'}. "
        f"Whoever may come in can load models from {reads} and from the hub, write checkpoints "
        f"into {writes}, and use this machine's memory, disk and processors. "
    )
    asked = [
        way
        for way, on in (
            (f"the header {allowed.user_header} of a proxy", allowed.user_header),
            ("a login", allowed.login),
            ("the access token", allowed.access_token),
        )
        if on
    ]
    if not asked:
        return exposed + f"Nothing is asked of anyone: set {TOKEN}, or see SECURITY.md."
    exposed += f"What is asked: {' and '.join(asked)}; it travels unencrypted unless TLS is set up."
    if allowed.user_header:
        exposed += " Whoever gets past the proxy can claim any name."
    return exposed


def check(address: str | None) -> int:
    """Checks the settings for a server at that address, before it starts; returns an exit status.

    What the server exposes, or what is wrong with a setting, is printed on stderr.
    """
    try:
        exposed = exposure(read_settings(os.environ, address, login_configured()))
    except TransActError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if exposed:
        print(exposed, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(check(sys.argv[1] if len(sys.argv) > 1 else None))
