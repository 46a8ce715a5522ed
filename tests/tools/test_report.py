"""fasfx.report: what is in the file, and that it works in a browser without a network."""

import base64
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fasfx
from fasfx.errors import CheckpointError, InputError, RuntimeUnavailableError
from fasfx.tools.bench.browser import chromium
from fasfx.tools.bench.models import tiny, tiny_inputs
from fasfx.tools.report.senders import NEURONS

pytest.importorskip("vl_convert", reason="needs the extra report")
TEXTS = ("</script> is no way out", "a second text")
CHARTS = ("error-chart", "raster-chart", "histogram-chart", "energy-chart", "layers-chart", "coverage-chart")
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def network() -> tuple[Any, fasfx.SpikingModel, list[dict[str, Any]]]:
    model, batches = tiny("bert"), [tiny_inputs("bert", seed=seed) for seed in range(2)]
    return model, fasfx.convert(model, batches, fasfx.SpikeConfig(timesteps=2, skip=("pooler",))), batches


@pytest.fixture(scope="module")
def page(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return fasfx.report(*network, path=path, timesteps=(1,), texts=TEXTS)


def data(page: Path) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    return json.loads(found)


# --- the file ----------------------------------------------------------------------------------------------


def test_it_is_one_small_file_that_loads_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    assert page.stat().st_size < LIMIT
    assert not re.search(
        r'<(script|img|iframe)[^>]* src=|<link[^>]* href="(?!data:)|@import|url\(', text.split("<script>")[0]
    )


def test_its_figures_are_those_of_check_and_energy(network: Any, page: Path) -> None:
    model, snn, batches = network
    measured, spent = fasfx.check(model, snn, batches, (1, 2)), fasfx.energy(snn, batches)
    shown = data(page)["charts"]["error-chart"]["data"]["values"]
    expected = {(row.timesteps, value) for row in measured.table.itertuples() for value in (row.relative_l2, row.bound)}
    assert {(point["T"], point["value"]) for point in shown} == expected
    bars = data(page)["charts"]["energy-chart"]["data"]["values"]
    assert sum(b["uJ"] for b in bars) == pytest.approx((spent.totals.original_pj + spent.totals.spiking_pj).sum() / 1e6)
    text = page.read_text("utf-8")
    assert f"{100 * spent.headline:.2f} % saved" in text and "What is left in float" in text
    for row in [*measured.sites.itertuples(), *measured.groups.itertuples()]:
        assert f">{row[1]}<" in text or f">{row[1]} <" in text
    assert re.search(r'href="https://github.com/huggingface/[^"]*modeling_bert.py#L\d+"', text)
    assert snn.timesteps == 2


def test_its_spikes_are_the_network_s(network: Any, page: Path) -> None:
    _, snn, batches = network
    senders = data(page)["senders"]
    assert senders["rows"] == list(TEXTS)
    for name, train in snn.spikes(**batches[0]).items():
        shown = senders["sites"][name]
        events = np.frombuffer(base64.b64decode(shown["events"][1]), np.int8).reshape(shown["steps"], -1)
        row = train.events[:, min(1, train.events.shape[1] - 1)].flatten(1)
        assert np.array_equal(events, row[:, :: max(1, row.shape[1] // NEURONS)][:, :NEURONS].numpy())
        assert sum(shown["thresholds"]) == train.scale.numel() and shown["top"] > 0


def test_errors_name_what_to_do(network: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="folder that exists"):
        fasfx.report(*network, path=tmp_path / "none" / "report.html", timesteps=(1,))
    with pytest.raises(InputError, match="empty"):
        fasfx.report(*network[:2], [], path=tmp_path / "report.html")


def test_without_the_extra_it_names_the_pip_command(network: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'fasfx\[report\]'"):
        fasfx.report(*network, path=tmp_path / "report.html")


# --- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="needs selenium")
    from selenium.webdriver.support.wait import WebDriverWait

    with ExitStack() as stack:
        try:
            found = stack.enter_context(chromium())
        except RuntimeUnavailableError as error:
            pytest.skip(str(error))
        found.get(page.as_uri())
        wait = "return document.querySelectorAll('.chart svg').length"
        WebDriverWait(found, 60).until(lambda one: one.execute_script(wait) == len(CHARTS))
        yield found


def column(browser: Any, table: str, number: int) -> list[str]:
    rows = f"[...document.querySelectorAll('#{table} tbody tr:not([hidden])')]"
    found: list[str] = browser.execute_script(f"return {rows}.map(row => row.cells[{number}].textContent.trim())")
    return found


def fill(browser: Any, selector: str, value: str) -> None:
    script = (
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, selector, value)


def test_it_loads_without_console_errors_and_draws_every_chart(browser: Any) -> None:
    assert browser.get_log("browser") == []
    for chart in CHARTS:
        marks = f"return document.querySelectorAll('#{chart} svg [role=graphics-symbol], #{chart} svg path').length"
        assert browser.execute_script(marks) > 0, chart


def test_columns_sort_both_ways_by_value(browser: Any) -> None:
    for number, numeric in ((0, False), (3, True), (7, True)):
        button = browser.find_element("css selector", f"#site-table thead th:nth-child({number + 1}) button")
        for direction in ("ascending", "descending"):
            browser.execute_script("arguments[0].click()", button)
            heading = browser.find_element("css selector", f"#site-table thead th:nth-child({number + 1})")
            assert heading.get_attribute("aria-sort") == direction
            found = column(browser, "site-table", number)
            if numeric:
                figures = [float(text) for text in found if text not in ("–", "exact")]
                assert figures == sorted(figures, reverse=direction == "descending") and len(set(figures)) > 2


def test_search_and_range_leave_the_rows_that_fit(browser: Any) -> None:
    everything = column(browser, "site-table", 1)
    fill(browser, "[data-search=site-table]", "encoder.layer.1 output")
    found = column(browser, "site-table", 1)
    assert 0 < len(found) < len(everything) and all("layer.1" in module for module in found)
    fill(browser, "[data-search=site-table]", "")
    fill(browser, "[data-column=site-table]", "1")
    fill(browser, "[data-least=site-table]", "0.9")
    rates = [float(text) for text in column(browser, "site-table", 4)]
    assert 0 < len(rates) < len(everything) and min(rates) >= 0.9
    assert browser.execute_script("return document.querySelector('[data-count=site-table]').textContent").startswith(
        f"{len(rates)} of"
    )
    fill(browser, "[data-least=site-table]", "")
    assert len(column(browser, "site-table", 1)) == len(everything)


def test_a_site_in_the_table_opens_its_spikes(browser: Any) -> None:
    button = browser.find_element("css selector", "#site-table tbody tr:last-child button")
    browser.execute_script("arguments[0].click()", button)
    chosen = browser.execute_script("return document.querySelector('#site').value")
    assert chosen == button.get_attribute("data-site")
    assert browser.get_log("browser") == []


def test_dark_and_light_change_the_ground(browser: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(ground)
    browser.execute_script("document.querySelector('#theme').click()")
    assert browser.execute_script(ground) != before


def test_it_prints_dark_on_white_whatever_the_screen(browser: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    browser.execute_script("document.documentElement.dataset.theme = 'dark'")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(ground) == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen"})
    assert browser.execute_script(ground) != "rgb(255, 255, 255)"
