"""The ablation page in a real Chromium: what somebody sees, hears, presses and prints."""

import base64
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from knet_platform.planning import load_sweep
from knet_platform.report import build_report, serving, write_report
from knet_platform.report.serving import LivePage, page_server
from knet_platform.storage import Evaluation, Failure, Store, TrialResult
from knet_platform.sweep import Sweep

pytestmark = pytest.mark.slow

EVIL = "<b onclick=alert(1)>\"bold\"</b> & 'single'"
STAGES = {"one": 1, "three": 3, EVIL: 5, "failed": 4}
APS = {"one": 0.218, "three": 0.341, EVIL: 0.345}
SECONDS = 30
"""Longest wait: the machine may be busy."""
READY_SECONDS = 20
"""Fifty arms; alone on two cores it takes a fifth of that."""


def webp(shade: int, width: int = 120) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 40), (shade, 90, 140)).save(buffer, "WEBP")
    return buffer.getvalue()


def result(trial_hash: str, ap: float, *, steps: int = 6, **metrics: float) -> TrialResult:
    evaluations = [
        Evaluation(step=100 * n, time=1e9 + n, metrics={"val/AP": ap * n / steps})
        for n in range(1, steps + 1)
    ]
    return TrialResult(
        trial_hash=trial_hash,
        step=100 * steps,
        metrics={"val/AP": ap, **metrics},
        evaluations=tuple(evaluations),
        checkpoint=f"checkpoint_{100 * steps}",
        num_parameters=1000,
        seconds=3600.0,
        wall_seconds=3700.0,
        device="NVIDIA A100",
        workers=8,
        finished_at="2026-01-01T00:00:00+00:00",
    )


def write_sweep(folder: Path, arms: dict[str, dict[str, int]], seeds: int, baseline: str) -> Sweep:
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("data: {format: shapes}\ntrain: {iterations: 600}\n")
    values = {
        "name": "rounds",
        "base": "recipe.yaml",
        "metric": {"name": "val/AP", "mode": "max"},
        "seeds": list(range(seeds)),
        "baseline": baseline,
        "arms": arms,
        "paper": {
            "source": "K-Net, Table 4c",
            "columns": {"val/AP": "AP", "bench/fps": "FPS"},
            "rows": {arm: [30.0, 20.0] for arm in list(arms)[:2]},
        },
    }
    (folder / "rounds.yaml").write_text(
        f"# Rounds of update\n{yaml.safe_dump(values, sort_keys=False)}"
    )
    return load_sweep(folder / "rounds.yaml")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """One arm's name is markup, which a sweep's file would not let pass."""
    tame = {arm: "five" if arm == EVIL else arm for arm in STAGES}
    arms = {tame[arm]: {"model.stages": stages} for arm, stages in STAGES.items()}
    sweep = write_sweep(tmp_path_factory.mktemp("rounds"), arms, 3, "three")
    wild = {name: arm for arm, name in tame.items()}
    return replace(
        sweep,
        arms=tuple(wild[arm] for arm in sweep.arms),
        trials=tuple(replace(trial, arm=wild[trial.arm]) for trial in sweep.trials),
    )


@pytest.fixture(scope="module")
def store(sweep: Sweep) -> Store:
    """Arms of three seeds with pictures, one of a name like markup, one that failed."""
    store = Store(str(sweep.path.parent / "storage"))
    for trial in sweep.trials:
        folder = store.trial(trial.hash)
        if trial.arm == "failed":
            failure = Failure(
                cause="crash",
                kind="Died",
                message=EVIL,
                action="stopped the trial",
                attempt=1,
                step=0,
            )
            folder.write_failure(failure)
            continue
        ap = APS[trial.arm] + 0.004 * trial.seed
        # The speed of one arm is missing.
        speed = {} if trial.arm == EVIL else {"bench/fps": 30.0 - STAGES[trial.arm]}
        folder.write_result(result(trial.hash, ap, **speed, **{"sys/gpu_hours": 2.0}))
        if trial.seed == 0:
            for step in (100, 300, 600):
                folder.write_bytes(f"pictures/step_{step:06d}.webp", webp(step // 3))
            columns = STAGES[trial.arm] + 2
            folder.write_bytes("pictures/stages_000600.webp", webp(9, 40 * columns))
            folder.write_bytes("pictures/kernels_000600.webp", webp(99))
    first = store.trial(sweep.trials[0].hash)
    first.write_points(
        0,
        [
            Evaluation(step=n, time=n, metrics={"train/loss": 90.0 if n == 7_777 else 2.0})
            for n in range(1, 10_001)
        ],
    )
    return store


@pytest.fixture(scope="module")
def page(sweep: Sweep, store: Store) -> str:
    written = write_report(build_report(sweep, store), sweep.path.parent / "report")
    return written["html"].as_uri()


@pytest.fixture
def opened(browser: webdriver.Chrome, page: str) -> webdriver.Chrome:
    """The page, seen for the first time."""
    open_page(browser, page)
    return browser


def open_page(browser: webdriver.Chrome, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(address)
    browser.execute_script("sessionStorage.clear()")
    browser.get_log("browser")
    browser.refresh()
    ready(browser)


def ready(browser: webdriver.Chrome) -> float:
    """Return the seconds until the page could be used."""

    def told(browser: webdriver.Chrome) -> Any:
        return browser.execute_script("return document.documentElement.dataset.ready")

    return float(WebDriverWait(browser, SECONDS).until(told)) / 1000


def arms(browser: webdriver.Chrome) -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, "table.sortable tbody th")
    return [row.get_attribute("data-value") or "" for row in rows]


def test_it_loads_without_a_request_or_a_complaint_and_names_are_text(
    opened: webdriver.Chrome,
) -> None:
    assert opened.get_log("browser") == []
    loaded = opened.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert arms(opened) == list(STAGES)
    assert opened.find_elements(By.CSS_SELECTOR, "[onclick]") == []
    legend = opened.find_elements(By.CSS_SELECTOR, ".legendtext")
    assert EVIL in [entry.text for entry in legend]
    main = opened.find_element(By.TAG_NAME, "main").text
    assert "no value: failed: Died" in main
    assert f"{EVIL} (every seed): no value: finished without FPS" in main
    assert f"Died: {EVIL}" in main


def test_headings_sort_by_keyboard_and_say_so(opened: webdriver.Chrome) -> None:
    heading = opened.find_element(By.XPATH, "//th[@aria-sort][normalize-space()='ours']")
    button = heading.find_element(By.TAG_NAME, "button")
    for order, expected in (
        ("descending", [EVIL, "three", "one", "failed"]),
        ("ascending", ["one", "three", EVIL, "failed"]),  # what is missing stays at the end
        ("none", list(STAGES)),
    ):
        button.send_keys(Keys.ENTER)
        assert heading.get_attribute("aria-sort") == order
        assert arms(opened) == expected
    sorted_ones = opened.find_elements(By.CSS_SELECTOR, "th[aria-sort]:not([aria-sort=none])")
    assert sorted_ones == []


def test_pointing_at_a_curve_names_the_arms_and_their_values(opened: webdriver.Chrome) -> None:
    plot = opened.find_element(By.CSS_SELECTOR, ".layers .js-plotly-plot")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    x, y, width, height = opened.execute_script(
        """
        const {xaxis, yaxis} = arguments[0]._fullLayout;
        const {width, height} = arguments[0].getBoundingClientRect();
        return [xaxis._offset + xaxis.l2p(600), yaxis._offset + yaxis.l2p(34.5), width, height];
        """,
        plot,
    )
    offset = int(x - width / 2), int(y - height / 2)
    ActionChains(opened).move_to_element(plot).move_to_element_with_offset(plot, *offset).perform()
    shown = WebDriverWait(opened, SECONDS).until(
        lambda browser: plot.find_element(By.CSS_SELECTOR, ".hoverlayer").get_property(
            "textContent"
        )
    )
    for told in ("three", "34.5", EVIL, "(n=3)"):
        assert told in shown


def test_long_curves_keep_their_peaks(opened: webdriver.Chrome) -> None:
    points, highest = opened.execute_script(
        """
        const plot = [...document.querySelectorAll(".layers .js-plotly-plot")].at(-1);
        const curve = plot.calcdata[0].map(point => point.y);
        return [curve.length, Math.max(...curve)];
        """
    )
    assert (points <= 1002, highest) == (True, 90)


def test_sliders_go_by_keyboard_and_speak(opened: webdriver.Chrome) -> None:
    slider = opened.find_element(By.ID, "evaluation")
    pictures = opened.find_elements(By.CSS_SELECTOR, ".evaluations figure:first-child img")

    def shown() -> list[str | None]:
        return [each.get_attribute("data-step") for each in pictures if each.is_displayed()]

    assert shown() == ["600"]
    for key, step in ((Keys.HOME, "100"), (Keys.ARROW_RIGHT, "300"), (Keys.END, "600")):
        slider.send_keys(key)
        assert shown() == [step]
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        assert opened.find_element(By.ID, "evaluation-shown").text == f"step {step}"

    slider = opened.find_element(By.ID, "update")
    moving = opened.find_elements(By.CSS_SELECTOR, ".updates .moving")
    for key, cells in ((Keys.HOME, ["1", "1", "1"]), (Keys.ARROW_RIGHT, ["2", "2", "2"])):
        slider.send_keys(key)
        found = [
            opened.execute_script("return arguments[0].style.getPropertyValue('--cell')", each)
            for each in moving
        ]
        assert found == cells
    slider.send_keys(Keys.END)  # arms with fewer updates show their last
    captions = [each.text for each in opened.find_elements(By.CSS_SELECTOR, ".updates .at")]
    assert captions == ["after update 1", "after update 3", "after update 5"]


def test_every_arm_that_has_kernel_maps_shows_them(opened: webdriver.Chrome) -> None:
    found = opened.find_elements(By.CSS_SELECTOR, "[aria-labelledby=kernels] figure")
    assert [each.find_element(By.TAG_NAME, "strong").text for each in found] == list(APS)
    for each in found:
        image = each.find_element(By.TAG_NAME, "img")
        assert int(image.get_property("naturalWidth")) > 0
        assert "kernel" in image.accessible_name


def test_seeds_and_bands_can_be_hidden(opened: webdriver.Chrome) -> None:
    def opacities(layer: str) -> set[float]:
        found = opened.execute_script(
            """
            const plot = document.querySelector(".layers .js-plotly-plot");
            const layer = plot.data.filter(trace => trace.meta === arguments[0]);
            return layer.map(trace => trace.opacity);
            """,
            layer,
        )
        return set(found)

    box = opened.find_element(By.ID, "bands")
    assert (box.is_selected(), opacities("band")) == (True, {0.13})
    box.send_keys(Keys.SPACE)
    assert (opacities("band"), opacities("seed")) == ({0}, {0.4})
    opened.refresh()
    ready(opened)
    assert opacities("band") == {0}  # a reload forgets nothing


def test_it_is_light_or_dark_as_the_system_is_until_somebody_chooses(
    opened: webdriver.Chrome,
) -> None:
    def lightness(what: str = "document.body", which: str = "backgroundColor") -> float:
        colour = opened.execute_script(f"return getComputedStyle({what}).{which}")
        return sum(float(part) for part in colour.strip("rgba()").split(",")[:3]) / 765

    chart_text = "document.querySelector('.xtick text')"

    def system(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def wait_for(page: bool, text: bool) -> None:
        """Wait until page and text are light (True) or dark: styles follow a moment later."""

        def agree(_: webdriver.Chrome) -> bool:
            return (lightness() > 0.8, lightness(chart_text, "fill") > 0.7) == (page, text)

        WebDriverWait(opened, SECONDS).until(agree)

    system("dark")
    wait_for(page=False, text=True)
    system("light")
    wait_for(page=True, text=False)
    opened.find_element(By.ID, "theme").send_keys(Keys.ENTER)
    wait_for(page=False, text=True)
    opened.refresh()
    ready(opened)
    wait_for(page=False, text=True)
    assert opened.find_element(By.ID, "theme").accessible_name == "Switch to light colours"


def test_the_keyboard_reaches_everything_and_everything_has_a_name(
    opened: webdriver.Chrome,
) -> None:
    body = opened.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "Skip to the table"
    for selector in ("button", "input", "a", "[role=region]", "[role=img]", "figure[role=group]"):
        found = opened.find_elements(By.CSS_SELECTOR, f"main {selector}, nav {selector}")
        unnamed = [
            each.get_attribute("outerHTML")
            for each in found
            if not each.accessible_name
            and not each.find_elements(By.XPATH, "ancestor::*[@class='modebar']")
        ]
        assert unnamed == []


def test_it_prints_in_light_colours_within_the_paper(opened: webdriver.Chrome) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    try:
        opened.execute_script("dispatchEvent(new Event('beforeprint'))")
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        widths = opened.execute_script(
            "return [...document.querySelectorAll('.main-svg')].map(svg => svg.clientWidth)"
        )
        assert colour == "rgb(255, 255, 255)"
        assert max(widths) <= 1032  # A4 across, without its margins, at 96 dpi
        assert not opened.find_element(By.TAG_NAME, "nav").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_a_sweep_without_numbers_says_so(
    browser: webdriver.Chrome, sweep: Sweep, tmp_path: Path
) -> None:
    report = build_report(sweep, Store(str(tmp_path / "empty")))
    open_page(browser, write_report(report, tmp_path)["html"].as_uri())
    assert browser.get_log("browser") == []
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "no trial has been evaluated yet" in text
    assert "none yet" in text
    assert arms(browser) == list(STAGES)


def test_fifty_arms_stay_quick(browser: webdriver.Chrome, tmp_path: Path) -> None:
    names = {f"model.num_kernels={n}": {"model.num_kernels": n} for n in range(50, 100)}
    sweep, store = (
        write_sweep(tmp_path, names, 3, "model.num_kernels=52"),
        Store(str(tmp_path / "s")),
    )
    for number, trial in enumerate(sweep.trials):
        metrics = {"bench/fps": 30.0 - number / 9, "sys/gpu_hours": 2.0 + number / 50}
        found = result(trial.hash, 0.2 + number / 1000, steps=100, **metrics)
        store.trial(trial.hash).write_result(found)
        if trial.seed == 0:
            store.trial(trial.hash).write_bytes("pictures/step_010000.webp", webp(number % 256))
    open_page(browser, write_report(build_report(sweep, store), tmp_path)["html"].as_uri())
    assert ready(browser) < READY_SECONDS
    assert browser.get_log("browser") == []
    milliseconds = browser.execute_script(
        """
        const start = performance.now();
        document.querySelector("th[data-column='3'] button").click();
        document.body.getBoundingClientRect();
        return performance.now() - start;
        """
    )
    assert milliseconds < 1000
    assert arms(browser)[0] == "model.num_kernels=99"


@pytest.fixture
def served(
    sweep: Sweep, store: Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    monkeypatch.setattr(serving, "LEAST_SECONDS", 0.2)
    server = page_server(LivePage(lambda: build_report(sweep, store)), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield lambda: f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_served_page_follows_the_sweep_and_stays_where_it_was(
    browser: webdriver.Chrome, served: Callable[[], str], sweep: Sweep, store: Store
) -> None:
    open_page(browser, served())
    browser.execute_script("scrollTo(0, 700)")
    assert browser.find_element(By.ID, "live").text == "live"
    before = browser.find_element(By.CSS_SELECTOR, ".facts").text
    trial = next(trial for trial in sweep.trials if trial.name == "failed/0")
    store.trial(trial.hash).write_result(result(trial.hash, 0.2))
    WebDriverWait(browser, SECONDS, ignored_exceptions=[Exception]).until(
        lambda browser: browser.find_element(By.CSS_SELECTOR, ".facts").text != before
    )
    ready(browser)
    assert "10 of 12" in browser.find_element(By.CSS_SELECTOR, ".facts").text
    assert browser.execute_script("return scrollY") == 700
    assert browser.get_log("browser") == []
