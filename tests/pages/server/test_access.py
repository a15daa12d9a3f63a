"""Nobody sees or computes anything before access is given."""

import logging

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from pages.server import access, settings, start_jobs
from pages.server.access import WRONG_TOKENS, WRONG_TOKENS_S, Gate
from pages.server.request import Cut, Request
from pages.server.visitors import Visit
from tests.pages.conftest import ROOT, WAIT, ended, exchange
from transact_core.base.errors import TransActError

TOKEN = "correct horse battery staple"


@pytest.fixture
def app(opened, app_ran_before, monkeypatch):
    """Runs the whole app in a session of its own, with these settings, at that address."""
    # The pages of one process share what is cached; each test begins with none of it.
    st.cache_resource.clear()
    st.cache_data.clear()
    asked = []
    real = opened.open
    monkeypatch.setattr(opened, "open", lambda request: (asked.append(request), real(request))[1])
    get_option = st.get_option

    def start(address="localhost", user=None, secrets=None, **environment) -> AppTest:
        for name in settings.NAMES:
            if name != "TRANSACT_CACHE":
                monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            st, "get_option", lambda key: address if key == "server.address" else get_option(key)
        )
        page = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT)
        page.secrets = secrets or {}
        if user is not None:
            page.user = user
        page.asked = asked
        return page.run()

    exchange(monkeypatch, "caller", lambda: "10.0.0.1")
    # `app.py` imports the names anew in each run, so they are exchanged where they come from.
    exchange(monkeypatch, "workbench", lambda: opened)
    yield start
    st.cache_resource.clear()


@pytest.fixture
def browser(monkeypatch):
    """Sets which browser the next run is in."""

    def become(visitor):
        exchange(monkeypatch, "visitor_id", lambda: visitor)

    return become


@pytest.fixture
def headers(monkeypatch):
    def send(**values):
        exchange(monkeypatch, "header_values", lambda name: values.get(name, []))

    return send


def shut(page) -> bool:
    """Whether nothing of the app is on the page, and nothing was begun."""
    assert not page.exception
    nothing_shown = not (page.sidebar.selectbox or page.metric or page.selectbox or page.slider)
    return nothing_shown and "visit" not in page.session_state and not page.asked


def inside(page) -> bool:
    assert not page.exception
    return bool(page.sidebar.selectbox) and isinstance(page.session_state["visit"], Visit)


def give(page, token: str):
    page.text_input[0].set_value(token)
    return page.button[0].click().run()


def errors(page) -> str:
    return "\n".join(each.value for each in page.error)


def test_where_nothing_is_asked_the_app_is_there(app):
    page = app()
    assert inside(page)
    assert not page.error


def test_no_access_before_the_token(app, browser):
    browser("ann")
    page = app(TRANSACT_ACCESS_TOKEN=TOKEN)
    assert shut(page)
    assert [each.label for each in page.text_input] == ["Access token"]
    assert shut(page.run())
    for wrong in ("", "wrong", TOKEN[:-1], TOKEN + " "):
        page = give(page, wrong)
        assert "not the access token" in errors(page)
        assert shut(page)


def test_the_right_token_opens_and_is_remembered_for_this_browser_only(app, browser):
    browser("ann")
    page = give(app(TRANSACT_ACCESS_TOKEN=TOKEN), TOKEN)
    assert inside(page)
    assert inside(page.run())
    assert not [each for each in page.session_state.to_dict().values() if each == TOKEN]
    again = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT)
    assert inside(again.run())
    browser("bob")
    stranger = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT)
    stranger.asked = []
    assert shut(stranger.run())


def test_a_browser_without_cookies_is_let_in_for_its_tab(app, browser):
    browser(None)
    page = give(app(TRANSACT_ACCESS_TOKEN=TOKEN), TOKEN)
    assert inside(page.run())
    other = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT)
    other.asked = []
    assert shut(other.run())


def test_too_many_wrong_tokens_stop_the_right_one_too(app, browser):
    browser("ann")
    page = app(TRANSACT_ACCESS_TOKEN=TOKEN)
    for _ in range(WRONG_TOKENS):
        page = give(page, "wrong")
    page = give(page, TOKEN)
    assert "try again in a minute" in errors(page)
    assert shut(page)


def test_the_gate_forgets_wrong_tokens_and_keeps_addresses_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    gate = Gate()
    for _ in range(WRONG_TOKENS):
        assert not gate.accepts("wrong", TOKEN, "10.0.0.1")
    with pytest.raises(TransActError):
        gate.accepts(TOKEN, TOKEN, "10.0.0.1")
    assert gate.accepts(TOKEN, TOKEN, "10.0.0.2")
    now[0] += WRONG_TOKENS_S + 1
    assert gate.accepts(TOKEN, TOKEN, "10.0.0.1")
    gate.let_in("ann")
    assert gate.knows("ann")
    assert not gate.knows("bob")
    assert not gate.knows(None)
    now[0] += access.REMEMBERED_S + 1
    assert not gate.knows("ann")


def test_any_typed_token_can_be_compared():
    gate = Gate()
    for typed in ("", "ключ", "\ud800", "\0", TOKEN[1:]):
        assert not gate.accepts(typed, TOKEN, typed)
    assert gate.accepts("ключ от дома номер", "ключ от дома номер", "x")


def test_what_the_gate_remembers_is_bounded(monkeypatch):
    monkeypatch.setattr(access, "MOST_REMEMBERED", 3)
    gate = Gate()
    for visitor in "abcde":
        gate.let_in(visitor)
        gate.accepts("wrong", TOKEN, visitor)
    assert [gate.knows(visitor) for visitor in "abcde"] == [False, False, True, True, True]
    assert len(gate._wrong) == 3


@pytest.mark.parametrize("values", [[], [""], ["  "], ["ann", "bob"], ["ann", "ann"]])
def test_the_proxy_must_name_exactly_one_user(app, headers, values):
    headers(**{"X-User": values})
    page = app(TRANSACT_USER_HEADER="X-User")
    assert shut(page)
    assert "through a proxy" in errors(page)


def test_the_proxys_user_is_the_visitor_in_any_browser(app, headers, browser, opened):
    headers(**{"X-User": ["ann"]})
    browser("laptop")
    laptop = app(TRANSACT_USER_HEADER="X-User")
    assert inside(laptop)
    browser("phone")
    phone = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT).run()
    mine = laptop.session_state["visit"].visitor
    assert phone.session_state["visit"].visitor is mine
    headers(**{"X-User": ["bob"]})
    bob = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT).run()
    assert bob.session_state["visit"].visitor is not mine


def test_the_header_is_not_believed_while_the_setting_is_off(app, headers, browser):
    headers(**{"X-Forwarded-User": ["ann"]})
    browser("laptop")
    page = app(TRANSACT_ACCESS_TOKEN=TOKEN)
    assert shut(page)


def test_only_named_users_come_in(app, headers):
    headers(**{"X-User": ["mallory"]})
    page = app(TRANSACT_USER_HEADER="X-User", TRANSACT_USERS="ann, bob")
    assert shut(page)
    assert "may not come in" in errors(page)
    headers(**{"X-User": ["bob"]})
    assert inside(page.run())


def test_the_header_and_the_token_are_both_asked_for(app, headers, browser):
    browser("laptop")
    headers(**{"X-User": ["ann"]})
    page = app(TRANSACT_USER_HEADER="X-User", TRANSACT_ACCESS_TOKEN=TOKEN)
    assert shut(page)
    assert inside(give(page, TOKEN))


LOGIN = {"auth": {"redirect_uri": "http://localhost/oauth2callback"}}
ANN = {"is_logged_in": True, "iss": "https://id.example", "sub": "7", "email": "ann@example.org"}


@pytest.mark.parametrize("user", [{}, {"is_logged_in": False}, {"email": "ann@example.org"}])
def test_streamlits_login_is_asked_for_where_it_is_set_up(app, user):
    page = app(secrets=LOGIN, user=user)
    assert shut(page)
    assert [each.label for each in page.button] == ["Log in"]


def test_who_is_logged_in_comes_in(app):
    page = app(secrets=LOGIN, user=ANN)
    assert inside(page)


@pytest.mark.parametrize(
    ("changes", "let_in"),
    [
        ({}, True),
        ({"email": "mallory@example.org"}, False),
        ({"email_verified": False}, False),
        ({"email_verified": True}, True),
        ({"email": None}, False),
        ({"iss": "", "sub": ""}, False),
    ],
)
def test_of_the_logged_in_only_named_ones_come_in(app, changes, let_in):
    page = app(secrets=LOGIN, user={**ANN, **changes}, TRANSACT_USERS="ann@example.org")
    assert inside(page) if let_in else shut(page)
    assert bool(page.error) != let_in


def test_wrong_settings_keep_the_app_shut(app):
    page = app(TRANSACT_ACCESS_TOKEN="short")
    assert shut(page)
    assert "stays shut. TRANSACT_ACCESS_TOKEN has 5 characters" in errors(page)


def test_an_open_server_warns_loudly_for_good(app, caplog, browser):
    browser("ann")
    with caplog.at_level(logging.WARNING):
        page = app(address="0.0.0.0")
    assert inside(page)
    assert "Nothing is asked of anyone" in errors(page)
    assert caplog.text.count("Nothing is asked of anyone") == 1
    assert "Understood" not in [each.label for each in page.button]
    assert "Nothing is asked of anyone" in errors(page.run())


def test_a_guarded_server_says_once_what_it_exposes(app, browser):
    browser("ann")
    page = give(app(address="0.0.0.0", TRANSACT_ACCESS_TOKEN=TOKEN), TOKEN)
    assert any("listens beyond" in each.value for each in page.text)
    understood = next(each for each in page.button if each.label == "Understood")
    page = understood.click().run()
    assert not any("listens beyond" in each.value for each in page.text)
    again = AppTest.from_file(ROOT / "app.py", default_timeout=WAIT).run()
    assert inside(again)
    assert not any("listens beyond" in each.value for each in again.text)


def test_a_path_out_of_the_folders_is_refused_where_it_is_opened(own_workbench, monkeypatch):
    st.cache_resource.clear()
    monkeypatch.setenv("TRANSACT_READ_FOLDERS", "")
    for request in (Request(model="/etc"), Request(calibration="/etc/passwd")):
        job = ended(own_workbench.open(request).bench)
        assert "may not be read from the browser" in job.error
    st.cache_resource.clear()


def test_a_checkpoint_is_not_written_out_of_the_folders(opened, monkeypatch, tmp_path):
    st.cache_resource.clear()
    monkeypatch.setenv("TRANSACT_WRITE_FOLDERS", str(tmp_path))
    mine = Visit()
    exchange(monkeypatch, "visit", lambda: mine)
    start_jobs.start_export(Cut(), tmp_path / ".." / "elsewhere")
    assert "TRANSACT_WRITE_FOLDERS" in ended(mine.visitor.jobs[-1]).error
    assert not (tmp_path.parent / "elsewhere").exists()
    st.cache_resource.clear()
