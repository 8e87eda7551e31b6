"""The page in a headless Chromium: loading, dragging, uploading, two tabs, a phone, and nothing from outside."""

import base64
import json

import pytest
import safetensors.torch
from PIL import Image

from bench.page import CHROMIUM, DRIVER, NEEDED, Page, chromium
from helpers import TINY, image_folder, images, tiny_pdae
from pdae_fast import Pipeline
from pdae_fast.data import open_dataset
from pdae_fast.demo import workbench
from pdae_fast.demo.workbench import Workbench

pytest.importorskip("selenium", reason="needs pip install 'pdae_fast[dev]' (selenium)")
ARROW_LEFT, ARROW_RIGHT, HOME, END = "\ue012", "\ue014", "\ue011", "\ue010"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=NEEDED)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(str(tmp_path_factory.mktemp("profile"))) as driver:
        yield driver


def addresses(driver):
    """Addresses that the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def page(driver, served):
    page = Page(driver, served.port)
    page.resize(1280, 900, mobile=False)
    addresses(driver), driver.get_log("browser")
    page.open()
    return page


def test_it_opens_with_an_edit_and_follows_a_slider(page):
    assert page.driver.title == "pdae_fast" and "tiny" in page["model"].text
    assert "arrived" in page["sliders"].text and not page["missing"].text
    shown = [page.source(name) for name in ("original", "reconstruction", "edited")]
    assert len(set(shown)) == 3
    page.drag("slider-round", 0.2, release=False)
    page.until(lambda: page.status("edit").startswith("preview") and page.source("edited") != shown[2])
    preview = page.source("edited")
    assert page.source("original") == shown[0]
    page.drag("slider-round", 0.2)
    page.until(page.rests)
    assert page.source("edited") not in (preview, shown[2])
    page["reset"].click()
    page.until(lambda: page.source("edited") == page.source("reconstruction"))
    assert not page.driver.get_log("browser")


def test_of_many_positions_the_last_is_shown_and_few_are_computed(page, pipe):
    before = pipe.evaluations["encoder"]
    page.run("""
      const slider = document.getElementById("slider-dark");
      for (let k = 0; k < 60; k++) {
        slider.value = (k % 30) / 100;
        slider.dispatchEvent(new Event("input"));
      }""")
    page.drag("slider-dark", 0.17)
    page.until(page.rests)
    # An image is encoded again for each position that is computed: the first, the last of the 60, and 0.17 twice.
    assert 2 <= pipe.evaluations["encoder"] - before <= 4
    last = page.source("edited")
    page.drag("slider-dark", -0.2)
    page.until(lambda: page.rests() and page.source("edited") != last)
    page.drag("slider-dark", 0.17)
    page.until(lambda: page.rests() and page.source("edited") == last)


def centre(page, name):
    """The middle of an element, and its width."""
    script = "const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2, b.width]"
    return page.run(script, page[name])


def mouse(page, kind, x, y):
    values = {"type": f"mouse{kind}", "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", values)


def test_a_slider_dragged_back_to_where_it_was_is_refined_too(page):
    before = page.source("edited")
    x, y, width = centre(page, "slider-dark")
    mouse(page, "Pressed", x, y)
    mouse(page, "Moved", x + width / 4, y)
    page.until(lambda: page.status("edit").startswith("preview") and page.source("edited") != before)
    mouse(page, "Moved", x, y)
    mouse(page, "Released", x, y + 60)  # and not over the slider
    assert page["slider-dark"].get_attribute("value") == "0"
    page.until(lambda: page.rests() and page.source("edited") == before)


def test_a_finger_that_scrolls_from_a_slider_leaves_it(page):
    page.resize(390, 500)
    before, value = page.source("edited"), page["slider-round"].get_attribute("value")
    page.run("arguments[0].scrollIntoView({block: 'end'})", page["slider-round"])
    x, y, width = centre(page, "slider-round")
    x -= width / 4
    touch = [("touchStart", y), ("touchMove", y - 30), ("touchMove", y - 80), ("touchEnd", None)]
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.run("window.seen = []; addEventListener('pointercancel', (e) => seen.push(e.target.id))")
        page.run("document.getElementById('slider-round').addEventListener('input', (e) => seen.push(e.target.value))")
        start = page.run("return scrollY")
        for kind, at in touch:
            points = [] if at is None else [{"x": x, "y": at}]
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.until(lambda: page.run("return scrollY") > start and "slider-round" in page.run("return seen"))
        assert page["slider-round"].get_attribute("value") == value, page.run("return seen")
        page.until(lambda: page.rests() and page.source("edited") == before)
    finally:
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def drop(page, path):
    page.run(
        "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), data = new DataTransfer();"
        "data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));"
        "document.body.dispatchEvent(new DragEvent('drop', {bubbles: true, dataTransfer: data}));",
        base64.b64encode(path.read_bytes()).decode(),
    )


def test_uploads_good_and_broken(page, tmp_path, folder):
    (tmp_path / "broken.png").write_bytes((folder / "00.png").read_bytes()[:-40])
    page["file"].send_keys(str(tmp_path / "broken.png"))
    page.until(lambda: page["problem"].is_displayed())
    assert page["problem"].text.startswith("broken.png: ") and str(tmp_path) not in page["problem"].text
    original = page.source("original")
    page["file"].send_keys(str(folder / "04.png"))
    page.until(lambda: page.rests() and page.source("original") != original)
    assert not page["problem"].is_displayed()
    before = page.source("original")
    drop(page, folder / "05.png")
    page.until(lambda: page.source("original") != before and page.rests())


def test_two_tabs_are_apart(page):
    first = page.driver.current_window_handle
    page.drag("slider-dark", 0.25)
    page.driver.switch_to.new_window("tab")
    second = page.driver.current_window_handle
    try:
        page.open()
        assert page["slider-dark"].get_attribute("value") == "0"
        page.drag("slider-dark", -0.25)
        page.driver.switch_to.window(first)
        page.until(page.rests)
        one = page.source("edited")
        page.driver.switch_to.window(second)
        page.until(page.rests)
        assert page.source("edited") != one and page["slider-dark"].get_attribute("value") == "-0.25"
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)


def test_every_tab_works_and_nothing_leaves_this_machine(page, served):
    keys = page["tab-edit"]
    keys.send_keys("\ue014")  # the right arrow
    assert page.run("return document.activeElement.id") == "tab-interpolate"
    page.until(lambda: "5 of 9" in page["between-text"].text and "frames" in page.status("interpolate"))
    middle = page.source("between")
    page.drag("scrub", 0)
    assert page.source("between") != middle
    page["tab-sample"].click()
    page.run("document.getElementById('which').value = '+dark'")
    page["go-sample"].click()
    page.until(lambda: "accepted" in page.status("sample"))
    assert len(page.run("return [...document.querySelectorAll('#samples img')].filter(i => i.naturalWidth)")) == 8
    page["tab-inside"].click()
    page["go-inside"].click()
    page.until(lambda: page.run("return document.querySelectorAll('#along img').length") == 4 * 8)
    page["go-recipe"].click()
    page.until(lambda: page.run("return document.querySelectorAll('#compare tbody tr').length") == 1)
    page["tab-sample"].click()
    page.driver.find_element("css selector", "#samples button").click()
    page.until(lambda: page["edit"].is_displayed() and page.rests())
    asked = [url for url in addresses(page.driver) if not url.startswith(("data:", "blob:", "chrome"))]
    assert len(asked) > 10 and all(url.startswith(served.url + "/") for url in asked), asked
    assert not page.driver.get_log("browser")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone(page, scheme):
    page.resize(390, scheme=scheme)
    wide = "return document.documentElement.scrollWidth"
    contrast = """
      const parts = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
      const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = (c) => { const [r, g, b] = parts(c).map(linear);
        return .2126 * r + .7152 * g + .0722 * b; };
      const [a, b] = [getComputedStyle(document.querySelector(arguments[0])).color,
        getComputedStyle(document.body).backgroundColor].map(light);
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);"""
    for name in ("edit", "interpolate", "sample", "inside"):
        page[f"tab-{name}"].click()
        assert page.run(wide) <= 390, name
    for text in (".quiet", "h1", ".slider .arrived b", ".slider label"):
        assert page.run(contrast, text) >= 4.5, text
    page["tab-edit"].click()
    page.run("scrollTo(0, 0)")
    top = page.run("return document.querySelector('.slider input').getBoundingClientRect().bottom")
    assert top <= 844  # the first slider is in sight


def test_controls_are_named_and_reached_by_keys(page):
    unnamed = page.run("""
      return [...document.querySelectorAll('button, input, select')].filter((e) => !(e.textContent.trim() || e.ariaLabel
        || [...(e.labels ?? [])].some((l) => l.textContent.trim()))).map((e) => e.outerHTML);""")
    assert not unnamed
    assert not page.run("return [...document.images].filter((i) => !i.hasAttribute('alt')).map((i) => i.outerHTML)")
    before = page.source("edited")
    page["slider-dark"].send_keys("\ue014" * 3)
    page.until(lambda: page.rests() and page.source("edited") != before)
    page["wipe"].send_keys("\ue012" * 5)
    assert page.run("return document.getElementById('wipe-after').style.clipPath") == "inset(0px 0px 0px 45%)"


def test_a_server_that_is_gone_is_said(page):
    page.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
    page.drag("slider-dark", 0.05)
    page.until(lambda: page["problem"].is_displayed())
    assert "Is it still running?" in page["problem"].text


def test_what_is_missing_is_said(driver, serve):
    page = Page(driver, serve(Workbench(Pipeline(tiny_pdae(TINY), "fast", device="cpu"), None, "bare")).port)
    page.resize(1280, 900, mobile=False)
    driver.get(page.url)
    page.until(lambda: "No attribute classifier" in page["missing"].text)
    assert "No images on offer" in page["missing"].text and "No latent DPM" in page["missing"].text
    assert not page["tab-sample"].is_enabled() and not page["draw"].is_displayed()


def test_a_preview_replaces_the_edit_alone(page):
    names = ("reconstruction", "wipe-before", "edited", "wipe-after")
    before = [page.source(name) for name in names]
    page.drag("slider-round", 0.2, release=False)
    page.until(lambda: page.status("edit").startswith("preview") and page.source("edited") != before[2])
    shown = [page.source(name) for name in names]
    assert shown[:2] == before[:2] and shown[3] == shown[2]
    page.drag("slider-round", 0.2)
    page.until(page.rests)
    assert page.source("reconstruction") == before[0]


def test_the_status_says_what_was_computed(page):
    page["reset"].click()
    page.until(lambda: page.rests() and "computed before" in page.status("edit"))
    page.drag("slider-dark", 0.1)
    page.until(lambda: page.rests() and "10 evaluations" in page.status("edit"))
    page.run("document.querySelectorAll('#strip button')[2].click()")
    page.until(lambda: page.rests() and "41 evaluations" in page.status("edit"))  # 31 of them for x_T


def select(page, name, value):
    page.run("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", page[name], value)


def test_only_solvers_that_go_with_the_recipe_can_be_chosen(page):
    enabled = "return [...document.getElementById('solver').options].filter((o) => !o.disabled).map((o) => o.value)"
    assert "31 evaluations: 10 steps solved by 2 evaluations each" in page["recipe-text"].text
    select(page, "solver", "dpm++3m")
    assert "20 evaluations: 10 steps up and 10 down by dpm++3m" in page["recipe-text"].text
    for recipe, solvers in {"diffae": ["ddim"], "reversible": ["belm"]}.items():
        select(page, "recipe", recipe)
        assert page.run(enabled) == solvers and "evaluations: " in page["recipe-text"].text
    page.until(page.rests)
    assert not page["problem"].is_displayed()


def test_nothing_stale_is_shown(page):
    rows = "return document.querySelectorAll('#compare tbody tr, #along tr').length"
    page["tab-interpolate"].click()
    page.until(lambda: "frames" in page.status("interpolate"))
    page["tab-inside"].click()
    page["go-inside"].click()
    page["go-recipe"].click()
    page.until(lambda: page.run("return ['#along img', '#compare img'].every((s) => document.querySelector(s))"))
    select(page, "recipe", "balanced")
    edited, between = page.source("edited"), page.source("between")
    page["tab-interpolate"].click()
    page.until(lambda: "frames" in page.status("interpolate") and page.source("between") != between)
    page["tab-edit"].click()
    page.until(lambda: page.rests() and page.source("edited") != edited)
    assert page.run(rows) > 1
    page.run("document.querySelectorAll('#strip button')[3].click()")
    assert page.run(rows) == 0
    page.until(page.rests)


def test_an_image_that_fails_leaves_nothing_of_the_last(page, bench, monkeypatch):
    page.until(page.rests)
    monkeypatch.setattr(bench, "edit", lambda *arguments: 1 / 0)
    page.run("document.querySelectorAll('#strip button')[3].click()")
    page.until(lambda: page["problem"].is_displayed())
    assert not any(page.source(name) for name in ("reconstruction", "edited", "wipe-after"))


def test_without_an_image_nothing_can_be_asked_of_it(driver, serve, pipe, folder):
    page = Page(driver, serve(Workbench(pipe, None, "bare")).port)
    page.resize(1280, 900, mobile=False)
    driver.get(page.url)
    page.until(lambda: "No images on offer" in page["missing"].text)
    driver.get_log("browser")
    enabled = """
      const controls = document.querySelectorAll(':is(#edit, #interpolate, #inside) :is(button, input, select)');
      return [...controls].filter((e) => !e.disabled);"""
    broken = """
      const seen = (i) => i.checkVisibility({visibilityProperty: true});
      return [...document.images].filter((i) => seen(i) && !i.getAttribute('src'));"""
    click = """
      const buttons = [...document.querySelectorAll('main button')];
      for (const b of buttons) if (b.checkVisibility() && b.id !== 'draw') b.click();"""
    assert not page.run(enabled)
    for name in ("interpolate", "inside", "edit"):
        page[f"tab-{name}"].click()
        assert not page.run(broken)
        page.run(click)
        page.run("document.getElementById('solver').dispatchEvent(new Event('change'))")
    page["file"].send_keys(str(folder / "04.png"))
    page.until(page.rests)
    assert page["slider-dark"].is_enabled() and not driver.get_log("browser")


def test_it_opens_with_the_first_image_that_can_be_read(driver, serve, pipe, tmp_path):
    image_folder(tmp_path, 3)
    (tmp_path / "00.png").write_bytes(b"nothing")
    page = Page(driver, serve(Workbench(pipe, open_dataset([tmp_path], 32, 1))).port)
    page.open()
    assert not page["problem"].is_displayed()
    assert page.run("return document.querySelector('#strip [aria-pressed=true]').ariaLabel") == "Image 1"


def test_a_random_image_can_be_returned_to(page):
    pressed = "return [...document.querySelectorAll('#strip [aria-pressed=true]')].map((b) => b.title)"
    page.run("document.querySelectorAll('#strip button')[4].remove(); Math.random = () => 4.5 / 6")
    count = page.run("return document.querySelectorAll('#strip button').length")
    for _ in range(2):
        page["random"].click()
        page.until(page.rests)
        assert page.run(pressed) == ["data-4"]
        assert page.run("return document.querySelectorAll('#strip button').length") == count + 1


def test_what_is_said_is_seen(page, folder):
    page["tab-interpolate"].click()
    said = "arguments[0].click(); return arguments[1].offsetParent && arguments[1].textContent"
    assert page.run(said, page["draw"], page["draw-status"]).startswith("computing")
    page.until(lambda: not page["draw-status"].text)
    page["tab-sample"].click()
    select(page, "which", "like")
    page["go-sample"].click()
    assert page["problem"].is_displayed()
    page["tab-inside"].click()
    assert not page["problem"].is_displayed()
    page["tab-sample"].click()
    drop(page, folder / "05.png")
    page.until(lambda: page["edit"].is_displayed() and page.rests())


def test_it_is_usable_on_a_phone_on_its_side(page):
    page.resize(667, 375)
    page.run("document.querySelectorAll('.slider')[1].scrollIntoView({block: 'end'})")
    stage = page.run("return document.querySelector('#edit .stage').getBoundingClientRect().bottom")
    slider = page.run("const b = document.querySelector('.slider').getBoundingClientRect(); return [b.top, b.bottom]")
    top = page.run("return document.querySelector('#edit .stage').getBoundingClientRect().top")
    assert 0 <= top < stage <= slider[0] and slider[1] <= 375


def test_the_table_of_recipes_fits_a_phone(page):
    page.resize(390)
    page["tab-inside"].click()
    for recipe, solver in (("reversible", "belm"), ("balanced", "dpm++3m")):
        select(page, "recipe", recipe), select(page, "solver", solver)
        page["go-recipe"].click()
        page.until(lambda: page.run("return document.querySelector('#compare img')") and not page.status("compare"))
    wide = "const e = arguments[0].parentElement; return e.scrollWidth - e.clientWidth"
    assert page.run(wide, page["compare"]) <= 0


def test_the_seed_of_the_pictures_is_said(page):
    page["tab-sample"].click()
    for asked, then in ((2**31 - 1, "0"), (0, "1")):
        page.run("document.getElementById('seed').value = arguments[0]", asked)
        page["go-sample"].click()
        page.until(lambda asked=asked: f"of seed {asked}," in page.status("sample"))
        assert page["seed"].get_attribute("value") == then
    page.run("document.getElementById('seed').value = -3")
    page["go-sample"].click()
    page.until(lambda: page["problem"].is_displayed())
    assert page["problem"].text == "seed must be between 0 and 2147483647, not -3"


def test_a_row_of_buttons_is_one_stop(page):
    stops = "return [...arguments[0].querySelectorAll('button')].map((b, i) => b.tabIndex ? '' : i).join('')"
    focus = "return [...document.activeElement.parentElement.children].indexOf(document.activeElement)"
    assert page.run(stops, page["strip"]) == "0"
    page.driver.find_element("css selector", "#strip button").send_keys(ARROW_RIGHT * 2)
    assert page.run(focus) == 2 and page.run(stops, page["strip"]) == "2"
    for key, at in ((END, 5), (ARROW_RIGHT, 0), (ARROW_LEFT, 5), (HOME, 0)):
        page.driver.switch_to.active_element.send_keys(key)
        assert page.run(focus) == at
    page["tab-edit"].send_keys(END)
    assert page["inside"].is_displayed() and page.run(focus) == 3
    page["tab-inside"].send_keys(HOME)
    assert page["edit"].is_displayed()


def test_what_is_saved(page, tmp_path):
    command = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", command)
    page.drag("slider-dark", 0.2)
    page["save-png"].click()  # while the preview is on screen
    page["save-latents"].click()
    files = {"00-edit.png", "00.safetensors", "between.gif"}
    page.until(lambda: (tmp_path / "00-edit.png").exists() and (tmp_path / "00.safetensors").exists())
    page.until(page.rests)
    assert (tmp_path / "00-edit.png").read_bytes() == base64.b64decode(page.source("edited").partition(",")[2])
    page["tab-interpolate"].click()
    page.until(lambda: "frames" in page.status("interpolate"))
    page["save-gif"].click()
    page.until(lambda: files == {path.name for path in tmp_path.iterdir()})
    assert set(safetensors.torch.load_file(tmp_path / "00.safetensors")) == {"z", "z_edited", "x_T"}
    assert Image.open(tmp_path / "between.gif").n_frames > 9


def test_an_image_that_the_server_forgot_is_sent_again(page, bench, folder, monkeypatch):
    original = page.source("original")
    page["file"].send_keys(str(folder / "04.png"))
    page.until(lambda: page.rests() and page.source("original") != original)
    own, edited = page.source("original"), page.source("edited")
    monkeypatch.setattr(workbench, "KEPT_IMAGES", 3)
    for image in images(4):  # another visitor's
        bench.keep(image, "x")
    page.drag("slider-dark", 0.2)
    page.until(lambda: page.rests() and page.source("edited") != edited)
    assert page.source("original") == own and not page["problem"].is_displayed()
    for image in images(4):
        bench.keep(image, "x")
    page["tab-interpolate"].click()
    page.until(lambda: "frames" in page.status("interpolate"))
    assert page.source("end-a") == own
