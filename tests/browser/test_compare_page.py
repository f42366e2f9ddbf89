"""MLflow's own page, in a real Chromium: what somebody sees who compares the arms of a sweep."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.ui import WebDriverWait

from knet_platform.planning import load_sweep
from knet_platform.storage import Evaluation
from knet_platform.tracking import SweepRun, TrialRun
from knet_platform.tracking.mlflow import MLflowTracker

pytestmark = pytest.mark.slow

SWEEP = """\
# Rounds of kernel update
name: rounds
base: recipe.yaml
metric: {name: val/AP, mode: max}
seeds: [0]
baseline: "3"
arms:
  "1": {model.stages: 1}
  "3": {}
"""
APS = {"1": 0.218, "3": 0.341}
SECONDS = 60
"""Longest wait for something to appear: the page is large and the machine may be busy."""
METRIC = "//a[normalize-space()='val/AP']"
METRICS = f"{METRIC}/ancestor::div[contains(., '0.341')][1]"


@pytest.fixture(scope="module")
def tracker(server, tmp_path_factory: pytest.TempPathFactory) -> MLflowTracker:
    """A sweep of two arms in MLflow, as a run would have left it."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "recipe.yaml").write_text("data: {format: shapes}\n")
    (folder / "rounds.yaml").write_text(SWEEP)
    sweep = load_sweep(folder / "rounds.yaml")
    tracker = MLflowTracker(server.uri, artifacts=folder)
    tracker.start_sweep(SweepRun.of(sweep))
    for trial in sweep.trials:
        tracker.start_trial(TrialRun.of(trial), 1)
        points = [
            Evaluation(
                step=step,
                time=1e9 + step,
                metrics={"train/loss": 5 / step, "val/AP": APS[trial.arm] * step / 300},
            )
            for step in range(20, 301, 20)
        ]
        tracker.log_points(trial.hash, points)
        for step in (100, 300):
            tracker.log_picture(trial.hash, step, picture(step))
        tracker.finish_trial(trial.hash, "FINISHED")
    tracker.finish_sweep("FINISHED")
    return tracker


def picture(step: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), (step % 256, 80, 120)).save(buffer, "PNG")
    return buffer.getvalue()


def appears(browser: webdriver.Chrome, xpath: str) -> WebElement:
    found: WebElement = WebDriverWait(browser, SECONDS).until(
        expected.visibility_of_element_located((By.XPATH, xpath)), f"not on the page: {xpath}"
    )
    return found


def test_the_arms_ticked_in_the_experiment_are_compared(
    browser: webdriver.Chrome, tracker: MLflowTracker, server
) -> None:
    browser.get(f"{server.uri}/#/experiments")
    # MLflow's first guess is chats and traces; it remembers what was pressed here.
    appears(browser, "//*[@role='button'][normalize-space()='Model training']").click()
    appears(browser, "//a[normalize-space()='rounds']").click()
    WebDriverWait(browser, SECONDS).until(expected.url_contains("/runs?"))
    appears(browser, f"{row('rounds')}//button").click()  # unfolds the sweep's trials
    for arm in ("1/0", "3/0"):
        appears(browser, f"{row(arm)}//*[contains(@class, 'ag-selection-checkbox')]").click()
    appears(browser, "//button[normalize-space()='Compare']").click()
    shows_what_differs(browser)
    keep_picture(browser)
    # The metric leads to its curves, on one axis of steps.
    appears(browser, METRIC).click()
    appears(browser, "//*[@class='xtitle'][text()='Step']")
    for arm in ("1/0", "3/0"):
        appears(browser, f"//span[text()='{arm} (val/AP)']")


def test_the_address_after_a_sweep_leads_to_the_same_page(
    browser: webdriver.Chrome, tracker: MLflowTracker
) -> None:
    url = tracker.compare_url()
    assert url is not None
    browser.get(url)
    shows_what_differs(browser)


def test_a_runs_pictures_are_shown_by_step(
    browser: webdriver.Chrome, tracker: MLflowTracker
) -> None:
    url = tracker.compare_url()
    assert url is not None
    browser.get(url)
    (first, _) = cells(browser, "Run ID:")
    appears(browser, f"//a[normalize-space()='{first}']").click()
    appears(browser, "//*[@role='tab' or self::a][normalize-space()='Model metrics']").click()
    # What is below the window is drawn when it comes into sight.
    heading = appears(browser, "//div[text()='Model metrics']")
    browser.execute_script("arguments[0].scrollIntoView()", heading)
    appears(browser, "//*[text()='probe']")
    slider = appears(browser, "//*[@role='slider']")
    for step in (100, 300):
        slider.send_keys(Keys.ARROW_RIGHT)
        assert slider.get_attribute("aria-valuenow") == str(step)
        shown = f"//img[contains(@src, 'probe%2Bstep%2B{step}%2B')]"
        image = WebDriverWait(browser, SECONDS).until(
            expected.presence_of_element_located((By.XPATH, shown))
        )
        WebDriverWait(browser, SECONDS).until(
            lambda _, image=image: image.get_property("naturalWidth") == 96
        )


def row(name: str) -> str:
    """Return the row of a run in an experiment's table, as XPath."""
    return f"//*[@role='row'][.//a[normalize-space()='{name}']]"


def shows_what_differs(browser: webdriver.Chrome) -> None:
    assert cells(browser, "Run Name:") == ["1/0", "3/0"]
    assert cells(browser, "model.stages") == ["1", "3"]
    # The page keeps headings and values apart; metrics are in the order of their names.
    headings, values = ["train/loss", "val/AP"], ["0.017", "0.017", "0.218", "0.341"]
    assert appears(browser, METRICS).text.split() == headings + values
    # What differs is the first parameter and chosen for the plot; what does not can be hidden.
    first = appears(browser, "//tr[./*[1][normalize-space()='arm.model.stages']]")
    assert not first.find_elements(By.XPATH, "./preceding-sibling::tr[./*[1]!='']")
    appears(browser, "//*[contains(@class, 'selection-item') and text()='model.stages']")
    appears(browser, "//*[text()='Show diff only']/preceding::button[1]").click()
    gone = (By.XPATH, "//tr[.//*[text()='model.backbone.frozen_stages']]")
    WebDriverWait(browser, SECONDS).until(expected.invisibility_of_element_located(gone))
    assert cells(browser, "model.stages") == ["1", "3"]


def keep_picture(browser: webdriver.Chrome) -> None:
    """Renew the README's picture of the page, in the folder that `KNET_SCREENSHOTS` names."""
    folder = os.environ.get("KNET_SCREENSHOTS")
    if folder is None:
        return
    heading = appears(browser, "//*[text()='Run details']")
    browser.execute_script("arguments[0].scrollIntoView()", heading)
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    table = appears(browser, METRICS).rect
    left, right = table["x"], table["x"] + table["width"]
    top, bottom = heading.rect["y"], table["y"] + table["height"]
    part = image.crop((int(left), int(top), int(right), int(bottom)))
    part.quantize(64).save(Path(folder, "mlflow-compare.png"), optimize=True)


def cells(browser: webdriver.Chrome, heading: str) -> list[str]:
    """Return a table row's texts, one for each run, once they are there."""
    row = appears(browser, f"//tr[*[1][normalize-space()='{heading}']]")
    return [cell.text for cell in row.find_elements(By.XPATH, "./*")[1:]]
