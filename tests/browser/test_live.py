"""The live view in a real browser: what it shows at a position, and how positions are set."""

import itertools
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from tests.browser.driving import at, button, choose, new_page, running_app, settle, slider
from tests.browser.live_page import SHAPES
from transact_core.models.architecture import Architecture
from transact_core.models.footprint import footprint
from transact_core.pruning.plan import widths, widths_of_layer

pytestmark = pytest.mark.browser
SHAPE = SHAPES["small"]


@pytest.fixture(scope="module")
def live_address(tmp_path_factory):
    log = tmp_path_factory.mktemp("live") / "log.txt"
    with running_app(log, "tests/browser/live_page.py") as address:
        yield address


@pytest.fixture(scope="module")
def opened(browser: Browser, live_address: str) -> Iterator[Page]:
    with new_page(browser) as page:
        page.goto(f"{live_address}/?predicted=1")
        yield page


@pytest.fixture
def view(opened: Page) -> Iterator[Page]:
    """The live view as at a first visit; the page around it is opened once for all tests."""
    at(opened, 33, 30)
    settle(opened)
    yield opened
    shown = opened.get_by_text("Shown", exact=True)
    opened.mouse.up()
    shown.click()
    expect(opened.locator(".live")).to_have_count(0)
    settle(opened)
    shown.click()


def rests(page: Page, mha: int, mlp: int, context: int = 1024) -> None:
    """Waits until Python has received this position."""
    expect(
        page.get_by_text(f"rests at {{'mha': {mha}, 'mlp': {mlp}, 'context': {context}}}")
    ).to_be_visible()


def figures(page: Page) -> dict[str, float]:
    """The exact figures that the live view shows, by name."""
    values = page.locator("[data-figure]").evaluate_all(
        "all => all.map(figure => [figure.dataset.figure, Number(figure.value)])"
    )
    return dict(values)


def assert_figures_are_the_footprint(page: Page, cut: Architecture) -> None:
    cost = footprint(cut, "float16", 1024)
    kv = cost.kv_bytes_per_token * 1024
    shown = figures(page)
    shown.pop("predicted")
    assert shown == {
        "parameters": cost.parameters,
        "weights4": 4 * cost.parameters,
        "weights2": cost.weight_bytes,
        "kv": kv,
        "flops": cost.flops_per_token,
        "serve": cost.weight_bytes + kv,
    }


def move(page: Page, side: str, value: int) -> None:
    """Moves a slider as one step of a drag does, without releasing it."""
    slider(page, side).evaluate(
        "(input, value) => { input.value = value;"
        " input.dispatchEvent(new Event('input', { bubbles: true })); }",
        value,
    )


@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups", "head-dims"])
def test_figures_at_positions_are_the_footprints(view: Page, granularity: str):
    choose(view, "Granularity", granularity)
    expect(view.locator(".live")).to_have_attribute("data-choices", granularity)
    for mha, mlp in itertools.product((0, 20, 33, 67, 95), (0, 1, 30, 50, 95)):
        move(view, "MHA", mha)
        move(view, "MLP", mlp)
        at(view, mha, mlp)
        cut = widths(SHAPE, mha / 100, mlp / 100, granularity).applied_to(SHAPE)
        assert_figures_are_the_footprint(view, cut)


@pytest.mark.parametrize("granularity", ["query-heads", "kv-groups"])
def test_figures_of_bars_are_the_footprints(view: Page, granularity: str):
    choose(view, "Granularity", granularity)
    expect(view.locator(".live")).to_have_attribute("data-choices", granularity)
    heads, channels = (
        view.locator(f'.module[data-side="{side}"] .bars') for side in ("mha", "mlp")
    )
    channels.focus()
    for key in ("End", "ArrowRight", "Home", "ArrowRight", "PageDown", "Shift+ArrowDown"):
        view.keyboard.press(key)
    heads.focus()
    for key in ("ArrowDown", "ArrowRight", "Home"):
        view.keyboard.press(key)
    # 33 and 30 % leave 8 heads and 140 channels.
    counts = {"query-heads": (8, 8, 4, 12), "kv-groups": (9, 9, 6, 12)}[granularity]
    kept = [1, 200, 119, 140]
    text = f"{counts[0]}x2.{counts[2]}h.{counts[3]}h|1h.200h.119h.140"
    expect(view.locator(".live")).to_have_attribute("data-widths", text)
    cut = SHAPE.with_layers(
        [widths_of_layer(SHAPE, granularity, *each) for each in zip(counts, kept, strict=True)]
    )
    assert_figures_are_the_footprint(view, cut)
    expect(view.locator(".perplexity")).to_contain_text("once the prices of layers")
    # The slider moves the bars that no hand has set.
    move(view, "MLP", 50)
    text = text.replace("140", "100")
    expect(view.locator(".live")).to_have_attribute("data-widths", text)
    button(view, "Uniform again").click()
    rests(view, 33, 50)
    button(view, "↶ Undo").click()
    expect(view.locator(".live")).to_have_attribute("data-widths", re.compile(r"\|1h\."))


def test_the_context_length_is_counted(view: Page):
    field = view.get_by_label("Context of")
    field.fill("5000")
    at(view, 33, 30, 5000)
    cut = widths(SHAPE, 0.33, 0.3, "query-heads").applied_to(SHAPE)
    cost = footprint(cut, "float16", 5000)
    assert figures(view)["flops"] == cost.flops_per_token
    assert figures(view)["kv"] == cost.kv_bytes_per_token * 5000
    rests(view, 33, 30, 5000)


def test_a_drag_is_followed_without_asking_python(view: Page):
    thumb = slider(view, "MLP")
    box = thumb.bounding_box()
    runs = view.get_by_text("rests at").inner_text()
    middle = box["y"] + box["height"] / 2
    view.mouse.move(box["x"] + 8 + 0.30 / 0.95 * (box["width"] - 16), middle)
    view.mouse.down()
    seen = set()
    for step in range(10):
        view.mouse.move(box["x"] + box["width"] * (0.35 + 0.05 * step), middle)
        view.evaluate("() => new Promise(requestAnimationFrame)")
        seen.add(view.locator(".live").get_attribute("data-shown"))
    assert len(seen) > 5
    view.mouse.up()
    expect(view.get_by_text(runs, exact=True)).to_have_count(0)
    mlp = int(thumb.input_value())
    assert mlp > 60
    rests(view, 33, mlp)


def test_keys_move_a_thumb_and_say_where_it_is(view: Page):
    mha = slider(view, "MHA")
    mha.focus()
    mha.press("End")
    at(view, 95, 30)
    expect(mha).to_have_attribute("aria-valuetext", re.compile("95 percent. 4 of 12 query heads"))
    mha.press("Home")
    mha.press("ArrowRight")
    at(view, 1, 30)
    rests(view, 1, 30)


def test_positions_and_choices_are_undone_and_redone(view: Page):
    button(view, "Gentle 20 / 20").click()
    rests(view, 20, 20)
    words = view.locator(".words").first
    expect(words).to_contain_text("8 of 12 query heads")
    choose(view, "Granularity", "kv-groups")
    expect(words).to_contain_text("9 of 12 query heads")
    button(view, "Half the MLP").click()
    rests(view, 0, 50)
    slider(view, "MHA").focus()
    view.keyboard.press("Control+z")
    rests(view, 20, 20)
    view.keyboard.press("Control+z")
    expect(words).to_contain_text("8 of 12 query heads")
    button(view, "↶ Undo").click()
    rests(view, 33, 30)
    expect(button(view, "↶ Undo")).to_be_disabled()
    for _ in range(2):
        view.keyboard.press("Control+y")
    expect(words).to_contain_text("9 of 12 query heads")
    rests(view, 20, 20)
    button(view, "↷ Redo").click()
    rests(view, 0, 50)
    expect(button(view, "↷ Redo")).to_be_disabled()
    button(view, "Reset").click()
    rests(view, 0, 0)


def test_python_never_refers_to_what_the_browser_may_have_thrown_away(
    page: Page, live_address: str
):
    received: list[ForwardMsg] = []
    page.on(
        "websocket",
        lambda socket: socket.on(
            "framereceived", lambda frame: received.append(ForwardMsg.FromString(frame))
        ),
    )
    page.goto(f"{live_address}/?predicted=1")
    at(page, 33, 30)
    for granularity in ("kv-groups", "query-heads", "kv-groups"):
        choose(page, "Granularity", granularity)
        expect(page.locator(".live")).to_have_attribute("data-choices", granularity)
    kinds = {message.WhichOneof("type") for message in received}
    assert "delta" in kinds
    assert "ref_hash" not in kinds


def test_what_python_sets_is_taken_over_and_can_be_undone(view: Page):
    button(view, "Put at 50").click()
    at(view, 50, 50)
    rests(view, 50, 50)
    button(view, "↶ Undo").click()
    rests(view, 33, 30)


def test_a_rerun_keeps_what_is_there(view: Page):
    view.locator(".live").evaluate("live => { live.dataset.mine = 'same' }")
    slider(view, "MHA").focus()
    choose(view, "Granularity", "head-dims")
    expect(view.locator(".words").first).to_contain_text("dims")
    expect(view.locator(".live")).to_have_attribute("data-mine", "same")
    at(view, 33, 30)


def test_what_was_measured_stands_first_and_the_prediction_beside_it(view: Page):
    card = view.locator(".perplexity")
    value, note = view.locator('[data-figure="predicted"]'), view.locator('[data-note="predicted"]')
    expect(card.locator(".name")).to_have_text("Perplexity, measured")
    expect(value).to_have_text("34.00")
    expect(note).to_contain_text("1.70 × dense, 1.60 to 1.80 (95 %)")
    expect(note).to_contain_text(re.compile(r"predicted \d+\.\d\d to \d+\.\d\d in 9 of 10 cases"))
    move(view, "MLP", 60)
    expect(card.locator(".name")).to_have_text("Perplexity, predicted")
    expect(note).to_contain_text("× dense")
    expect(card).not_to_contain_text("95 %")


def test_without_a_prediction_it_says_what_to_do(page: Page, live_address: str):
    page.goto(live_address)
    expect(page.locator(".perplexity")).to_contain_text("measure a point")


def test_a_layer_tells_its_numbers(view: Page):
    view.locator("canvas.heads").hover(position={"x": 5, "y": 22 * 2 + 5})
    expect(view.get_by_label("Layer", exact=True)).to_have_value("2")
    view.get_by_label("Layer", exact=True).fill("3")
    expect(view.locator(".curve-title")).to_have_text("Channel scores of layer 3")
    expect(view.locator(".numbers")).to_contain_text("64 of 96")
