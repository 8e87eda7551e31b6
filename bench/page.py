"""The page with sliders, served and handled from a program: `python -m bench.page` films docs/demo.gif (Chromium)."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pdae_fast import cli
from pdae_fast.demo.workbench import Workbench
from pdae_fast.errors import UserError
from pdae_fast.files import atomic_write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDED = "needs Chromium and its driver: apt install chromium chromium-driver"
# It draws without a screen and asks nobody but the page.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-device-scale-factor=1",
)  # fmt: skip


class Served(NamedTuple):
    port: int
    app: Any


@contextlib.contextmanager
def serving(bench: Workbench) -> Iterator[Served]:
    """The page on a free port of this machine, in a thread."""
    import uvicorn

    from pdae_fast.demo.app import application
    from pdae_fast.demo.command import listen

    with listen("127.0.0.1", 0) as listener:
        app = application(bench)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Served(listener.getsockname()[1], app)
        finally:
            server.should_exit = True
            thread.join(20)
            if thread.is_alive():
                raise RuntimeError("the server does not end")


@contextlib.contextmanager
def chromium(profile: str) -> Iterator[Any]:
    """A browser with an empty profile folder, as a Selenium driver that logs its requests and what it complains of."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page of a server in a browser, read and handled as by a visitor."""

    def __init__(self, driver: Any, port: int) -> None:
        self.driver, self.url = driver, f"http://127.0.0.1:{port}"

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(self.rests)

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def status(self, kind: str) -> str:
        return self[f"{kind}-status"].text

    def source(self, name: str) -> str:
        return self[name].get_attribute("src")

    def rests(self) -> bool:
        """Whether the picture is the refined one of where the sliders are."""
        busy = self.run("return document.querySelector('#edit .stage').getAttribute('aria-busy')")
        return busy == "false" and self.status("edit").startswith("refined")

    def until(self, condition: Any, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self["problem"].text, self.driver.get_log("browser"))
            time.sleep(0.03)

    def drag(self, name: str, value: float, release: bool = True) -> None:
        """Move a slider as a pointer does: input events, and a change where it is let go."""
        self.run(
            "const s = arguments[0]; s.value = arguments[1]; s.dispatchEvent(new Event('input', {bubbles: true}));"
            "if (arguments[2]) s.dispatchEvent(new Event('change', {bubbles: true}));",
            self[name], value, release,
        )  # fmt: skip

    def resize(self, width: int, height: int = 844, mobile: bool = True, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)


# -- the film ----------------------------------------------------------------------------------------------------------

SIZE = (900, 760)
STEPS = [k / 100 for k in range(3, 18, 3)]
MOVES = ("sunglasses", "dark_skin")


def film(page: Page) -> list[Any]:
    """Pillow images of sliders that move one after the other, and of the wipe."""
    from PIL import Image

    frames = []

    def shoot() -> None:
        page.until(page.rests)
        frames.append(Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB"))

    page.resize(*SIZE, mobile=False)
    page.open()
    page.drag("slider-sunglasses", 0)
    page.drag("wipe", 100)
    shoot()
    for name in MOVES:
        for step in STEPS:
            page.drag(f"slider-{name}", step)
            shoot()
    for share in range(80, -1, -20):
        page.drag("wipe", share)
        shoot()
    # Colours for all, of a sheet of all.
    sheet = Image.new("RGB", (SIZE[0], SIZE[1] * len(frames)))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (0, SIZE[1] * i))
    colours = sheet.quantize(256)
    return [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]


def main(argv: list[str] | None = None) -> None:
    from pdae_fast.demo import command

    p = argparse.ArgumentParser(description="Film the page with sliders.")
    p.add_argument("--out", type=Path, default=Path("docs/demo.gif"))
    args = p.parse_args(argv)
    if not (CHROMIUM and DRIVER):
        raise UserError(f"the film {NEEDED}")
    bench = command.workbench(command.parser().parse_args([]))
    with serving(bench) as served, tempfile.TemporaryDirectory() as profile, chromium(profile) as driver:
        first, *others = film(Page(driver, served.port))
    with atomic_write(args.out) as file:
        times = [600, *[200] * (len(others) - 1), 1500]
        first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    print(f"wrote {args.out}, {args.out.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
