"""The explorer's page in a real Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator:
    """Start a browser; the tests that need it are skipped without."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian's package `chromium`)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        opened = started.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


def open_page(browser, address: str, **options):
    """Open a page; errors of its scripts are kept in `failures`."""
    page = browser.new_page(**options)
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.set_default_timeout(120_000)
    page.goto(address)
    return page


def settled(page, state: str = "ready"):
    """Wait until the explorer has drawn, or has refused to."""
    page.wait_for_selector(f"body[data-state={state}]")
    assert not page.failures
    return page


def shown(page, row: str = "texture") -> np.ndarray:
    """What the canvases of a row hold, uint8 (panels, pixels, 3)."""
    script = """row => [...document.querySelectorAll(`#panels canvas[data-row=${row}]`)].map(
        canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data])"""
    return np.array([np.reshape(each, (-1, 4)) for each in page.evaluate(script, row)], np.uint8)[..., :3]


def matches(page, images: np.ndarray, row: str = "texture") -> bool:
    """Whether a row shows these images, uint8 (panels, S, S, 3)."""
    return np.array_equal(shown(page, row), images.reshape(len(images), -1, 3))


def slide(page, name: str, value: float) -> None:
    """Move a slider, as a hand does."""
    page.locator(f"#{name}").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )
