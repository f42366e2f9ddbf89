"""A real Chromium without a window, shared by all tests of pages."""

import os
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests with the browser to one process of pytest-xdist."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if "browser" in names and "server" not in names:
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def started_browser() -> Iterator[webdriver.Chrome]:
    driver = shutil.which("chromedriver")
    assert driver, "no chromedriver; expected Debian's: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        *("--headless=new", "--window-size=1600,1200", "--disable-dev-shm-usage"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page is local, wholly
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(started_browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    yield started_browser
    started_browser.get("about:blank")  # a page that nobody looks at takes a tenth of a core
