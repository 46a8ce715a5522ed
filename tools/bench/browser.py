"""A headless Chromium, for reports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fasfx.errors import RuntimeUnavailableError

ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1400")


@contextmanager
def chromium() -> Iterator[Any]:
    """selenium's driver of it, which keeps the console's messages. Raises RuntimeUnavailableError without either."""
    found, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if found is None or driver is None:
        raise RuntimeUnavailableError("no Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
