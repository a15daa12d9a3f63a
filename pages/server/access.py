"""Who may come in: tokens, headers of a proxy, and logins, checked without drawing anything."""

import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable

import streamlit as st

from pages.server.settings import Settings
from transact_core.base.errors import TransActError

REMEMBERED_S = 12 * 3600
"""Seconds for which a browser that gave the token need not give it again."""
WRONG_TOKENS, WRONG_TOKENS_S = 5, 60
"""After this many wrong tokens from one address within so many seconds, no token is checked."""
MOST_REMEMBERED = 10_000
"""Browsers and addresses; the oldest are forgotten first."""


class Gate:
    """Remembers which browsers gave the token, and which addresses gave wrong ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._let_in: OrderedDict[str, float] = OrderedDict()
        self._wrong: OrderedDict[Hashable, list[float]] = OrderedDict()
        self._told: OrderedDict[Hashable, None] = OrderedDict()

    def accepts(self, token: str, expected: str, address: Hashable) -> bool:
        """Whether a token is the expected one.

        Raises:
            TransActError: this address has given too many wrong tokens.
        """
        now = time.monotonic()
        with self._lock:
            wrong = [at for at in self._wrong.get(address, ()) if now - at < WRONG_TOKENS_S]
            if len(wrong) >= WRONG_TOKENS:
                raise TransActError(
                    f"{WRONG_TOKENS} wrong tokens came from your address; try again in a minute."
                )
            # Of equal length whatever was typed, so that the time taken tells nothing.
            right = hmac.compare_digest(_digest(token), _digest(expected))
            if not right:
                _remember(self._wrong, address, [*wrong, now])
            return right

    def let_in(self, visitor: str | None) -> None:
        """Remembers a browser that gave the token."""
        if visitor is not None:
            with self._lock:
                _remember(self._let_in, visitor, time.monotonic())

    def knows(self, visitor: str | None) -> bool:
        """Whether this browser gave the token within the last `REMEMBERED_S` seconds."""
        with self._lock:
            since = self._let_in.get(visitor)
            return since is not None and time.monotonic() - since < REMEMBERED_S

    def tell(self, visitor: Hashable) -> None:
        """Remembers that this visitor has read what the server exposes."""
        with self._lock:
            _remember(self._told, visitor, None)

    def was_told(self, visitor: Hashable) -> bool:
        with self._lock:
            return visitor in self._told


def _digest(token: str) -> bytes:
    return hmac.digest(b"transact", token.encode("utf-8", "surrogatepass"), "sha256")


def _remember(known: OrderedDict, key: Hashable, value: object) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > MOST_REMEMBERED:
        known.popitem(last=False)


@st.cache_resource(show_spinner=False)
def gate() -> Gate:
    return Gate()


def caller() -> str | None:
    """The address that this session comes from; None is this machine."""
    return st.context.ip_address


def header_values(name: str) -> list[str]:
    """All values of a header of the request that opened this session."""
    return st.context.headers.get_all(name)


def user_of_header(allowed: Settings) -> str:
    """Whom the proxy before the app names.

    Raises:
        TransActError: nobody, or several, as where a visitor sends the header past the proxy.
    """
    values = [value.strip() for value in header_values(allowed.user_header)]
    if len(values) != 1 or not values[0]:
        raise TransActError(
            "This app is entered through a proxy that says who comes, and this visit does not say "
            "so; use the proxy's address, or tell whoever runs it."
        )
    return _allowed_user(values[0], allowed)


def user_of_login(allowed: Settings) -> str:
    """Who is logged in, by the provider's own and lasting name for the account.

    Raises:
        TransActError: someone who may not come in.
    """
    account = f"{st.user.get('iss', '')} {st.user.get('sub', '')}"
    if not account.strip():
        raise TransActError("The login did not say who you are; tell whoever runs this app.")
    # An address that the provider has not seen proof of could be anyone's.
    email = "" if st.user.get("email_verified") is False else str(st.user.get("email", ""))
    _allowed_user(email, allowed)
    return account


def _allowed_user(user: str, allowed: Settings) -> str:
    if allowed.users is not None and user not in allowed.users:
        raise TransActError("You are known and may not come in here; ask whoever runs this app.")
    return user
