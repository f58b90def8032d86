"""The page in a real browser: dropped photographs, the slider, downloads, errors, no requests out.

Needs playwright's Python package and a Chromium of the system; else it is skipped.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from object_stand_in import exact_prior
from PIL import Image
from serve_stand_in import SLOW

from latentdem.io import to_pil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or CHROMIUM is None,
    reason="needs a browser: pip install playwright, and Chromium (apt-get install chromium)",
)
WAIT = 60_000


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # As root, in a container, Chromium has no sandbox; the page is our own.
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        opened = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[*sandbox, "--enable-unsafe-swiftshader", "--use-angle=swiftshader"],
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server):
    """The page, which must not ask any other server, nor meet an error of a script."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT)
    asked, errors = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(server.url)
    opened.wait_for_selector("#deblur-start")
    yield opened
    context.close()
    hosts = {
        urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")
    }
    assert hosts == {"127.0.0.1"}
    assert errors == []


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "holiday.png"
    to_pil(torch.rand(3, 48, 64)).save(path)
    return path


def set_steps(page, steps):
    page.get_by_role("button", name="More options").click()
    field = page.locator("#steps input[type=number]")
    for _ in range(20):  # the accordion may yet be opening, and set the field anew
        field.fill(str(steps))
        field.press("Tab")
        page.wait_for_timeout(200)
        if page.locator("#steps input[type=range]").input_value() == str(steps):
            return
    raise AssertionError("the field does not keep what is typed")


def drop(page, selector, path):
    """As if the file were dragged from another window."""
    content = list(path.read_bytes())
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], name, {type: "image/png"}));
            return transfer;
        }""",
        [content, path.name],
    )
    page.dispatch_event(f"{selector} button", "drop", {"dataTransfer": transfer})


def test_deblur(page, photo, tmp_path):
    drop(page, "#photo", photo)
    page.wait_for_selector("#photo img")
    page.locator("#kernel-size input, #kernel-size textarea").fill("5")
    set_steps(page, 2)
    page.click("#deblur-start")
    page.wait_for_selector("#deblur-slider img")
    assert "Done in" in page.inner_text("#deblur-status")
    assert page.locator("#deblur-slider img").count() == 2
    assert "64 x 48 pixels" in page.inner_text("#deblur-facts")
    assert page.is_visible("#deblur-kernel img")
    assert page.is_visible("#deblur-start") and not page.is_visible("#deblur-cancel")
    for name in ("restored.png", "report.json", "everything (zip)"):
        with page.expect_download() as download:
            page.locator("#deblur-files").get_by_text(name).click()
        download.value.save_as(tmp_path / f"got-{name}")
    with Image.open(tmp_path / "got-restored.png") as restored:
        assert restored.size == (64, 48)
    report = json.loads((tmp_path / "got-report.json").read_text())
    assert report["kernel_size"] == 5 and report["settings"]["steps"] == 2


def test_cancel(page, photo, server):
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#photo img")
    set_steps(page, SLOW)
    page.click("#deblur-start")
    page.wait_for_selector("#deblur-live img")
    assert "of 3000" in page.inner_text("#deblur-status")
    page.click("#deblur-cancel")
    page.get_by_text("Cancelled; nothing is computed any more.").wait_for()
    assert server.idle()
    page.wait_for_selector("#deblur-start")
    assert not page.is_visible("#deblur-live") and not page.is_visible("#deblur-slider")


def test_closing_the_page_stops_the_work(page, photo, server):
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#photo img")
    set_steps(page, SLOW)
    page.click("#deblur-start")
    page.wait_for_selector("#deblur-live img")
    page.close()
    assert server.idle()


def test_errors_are_one_clear_line(page, tmp_path, photo):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    page.set_input_files("#photo input[type=file]", text)
    page.get_by_role("alert").get_by_text("text.png: not a picture").wait_for()
    large = tmp_path / "large.png"
    to_pil(torch.zeros(1, 200, 300)).save(large)
    page.set_input_files("#photo input[type=file]", large)
    page.get_by_role("alert").get_by_text("300 x 200 = 0.1 megapixels, more than").wait_for()
    assert page.locator("#photo img").count() == 0
    page.click("#deblur-start")
    page.get_by_role("alert").get_by_text("choose a photograph first").wait_for()
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#photo img")
    page.locator("#kernel-size input, #kernel-size textarea").fill("6")
    page.click("#deblur-start")
    page.get_by_role("alert").get_by_text(
        "kernel_size must be odd and positive, found 6"
    ).wait_for()
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(photo.read_bytes() + b"\0" * 110_000)
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.set_input_files("#photo input[type=file]", heavy)
    page.get_by_text("exceed the maximum").first.wait_for()


def test_objects(page, tmp_path):
    _, views = exact_prior()
    paths = []
    for k, view in enumerate(views[:2]):
        paths.append(tmp_path / f"view{k}.png")
        to_pil(view).save(paths[-1])
    page.get_by_role("tab", name="Objects").click()
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    page.set_input_files("#views input[type=file]", [paths[0], bad])
    page.get_by_role("alert").get_by_text("bad.png: not a picture").wait_for()
    page.set_input_files("#views input[type=file]", paths[1])
    page.wait_for_function("document.querySelectorAll('#views img').length == 2")
    page.click("#objects-start")
    page.wait_for_selector("#objects-cancel")
    assert not page.is_visible("#mesh") and not page.is_visible("#turntable")
    page.wait_for_selector("#turntable img")
    assert "view1.png" in page.inner_text("#poses")
    assert page.is_visible("#sheet img")
    with page.expect_download() as download:
        page.locator("#objects-files").get_by_text("mesh.glb").click()
    assert Path(download.value.path()).read_bytes()[:4] == b"glTF"
    page.wait_for_selector("#mesh canvas")
    page.click("#objects-start")  # the viewer comes back with the next result
    page.wait_for_selector("#turntable img", state="hidden")
    page.wait_for_selector("#mesh canvas")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, server, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#deblur-start", timeout=WAIT)
    for tab in ("Deblur", "Objects"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for empty in ("#mesh", "#turntable", "#sheet", "#deblur-slider", "#deblur-kernel"):
        assert not page.is_visible(empty)
    context.close()
