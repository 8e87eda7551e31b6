"""The page in a headless Chromium: loading, dragging, uploading, two tabs, a phone, and nothing from outside."""

import base64
import json

import pytest

from bench.page import CHROMIUM, DRIVER, NEEDED, Page, chromium

pytest.importorskip("selenium", reason="needs pip install 'pdae_fast[dev]' (selenium)")
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


def test_uploads_good_and_broken(page, tmp_path, folder):
    (tmp_path / "broken.png").write_bytes((folder / "00.png").read_bytes()[:-40])
    page["file"].send_keys(str(tmp_path / "broken.png"))
    page.until(lambda: page["problem"].is_displayed())
    assert page["problem"].text.startswith("broken.png: ") and str(tmp_path) not in page["problem"].text
    original = page.source("original")
    page["file"].send_keys(str(folder / "04.png"))
    page.until(lambda: page.rests() and page.source("original") != original)
    assert not page["problem"].is_displayed()
    data = base64.b64encode((folder / "05.png").read_bytes()).decode()
    before = page.source("original")
    page.run(
        "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), data = new DataTransfer();"
        "data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));"
        "document.body.dispatchEvent(new DragEvent('drop', {bubbles: true, dataTransfer: data}));",
        data,
    )
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
    from helpers import TINY, tiny_pdae
    from pdae_fast import Pipeline
    from pdae_fast.demo.workbench import Workbench

    page = Page(driver, serve(Workbench(Pipeline(tiny_pdae(TINY), "fast", device="cpu"), None, "bare")).port)
    page.resize(1280, 900, mobile=False)
    driver.get(page.url)
    page.until(lambda: "No attribute classifier" in page["missing"].text)
    assert "No images on offer" in page["missing"].text and "No latent DPM" in page["missing"].text
    assert not page["tab-sample"].is_enabled() and not page["draw"].is_displayed()
