"""The site in a browser: sorting, filters, shared links, the budget, pages of all kinds, and who cannot use a mouse or see well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.flags.kinds import folded
from slimbench.leaderboard.recommend import Budget, recommend
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names
from slimbench.leaderboard.tables.columns import COLUMNS
from slimbench.leaderboard.tables.format import decimal
from tests.browser.conftest import screen, written
from tests.support.board_records import Spec, records

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROWS = "#cells tbody tr:not(.group)"
PATIENCE = 30


def wait(condition: Callable[[], Any]) -> Any:
    """What a condition says once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return found


def open_ranking(browser: Any, board: Path, fragment: str = "") -> None:
    browser.get("about:blank")
    browser.get((board / "index.html").as_uri() + fragment)
    wait(lambda: browser.execute_script("return document.documentElement.classList.contains('ready')"))


def pipelines(browser: Any) -> list[str]:
    return browser.execute_script(f"return [...document.querySelectorAll('{ROWS} th a')].map(a => a.textContent)")


def headings(browser: Any) -> list[str]:
    """What stands above the sets of the table."""
    return [found.text for found in browser.find_elements(By.CSS_SELECTOR, "#cells tr.group b")]


def column(browser: Any, header: str) -> list[str]:
    """The numbers of a column, without their intervals."""
    return browser.execute_script(
        f"""
        const text = (cell) => (cell.firstChild?.firstChild ?? cell.firstChild).textContent;
        const at = [...document.querySelectorAll('#cells thead th')].findIndex(th => th.textContent.trim() === arguments[0]);
        return [...document.querySelectorAll('{ROWS}')].map(tr => text(tr.children[at]));""",
        header,
    )


def click(browser: Any, selector: str) -> None:
    browser.execute_script("arguments[0].click()", browser.find_element(By.CSS_SELECTOR, selector))


def settle(browser: Any) -> None:
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 150));")


PAGES = ("ranking", "model", "method", "cell", "figures", "apart", "coverage", "methods", "guide")


def address(board: Path, made: list[Record], kind: str) -> Path:
    row = next(row for row in rows(made) if row.label == "rtn" and row.model == "tiny-135m")
    named = {"ranking": "index.html", "model": names.model(row.model), "method": names.method("gptq"), "cell": names.cell(row)}
    return board / named.get(kind, f"{kind}.html")


@pytest.fixture(autouse=True)
def no_errors(browser: Any) -> Iterator[None]:
    browser.get_log("browser")
    yield
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def known(made: list[Record]) -> list[Row]:
    return [row for row in rows(made) if row.model == "tiny-135m"]


def test_every_cell_is_in_the_table_and_its_numbers_are_those_of_the_rows(browser: Any, board: Path, made: list[Record]) -> None:
    open_ranking(browser, board, "#model=tiny-135m&columns=" + "+".join(c.key for c in COLUMNS))
    assert sorted(pipelines(browser)) == sorted(row.label for row in known(made))
    by_name = {row.label: row for row in known(made)}
    shown = pipelines(browser)
    for wanted in COLUMNS:
        assert column(browser, wanted.header) == [wanted.value(by_name[name]) for name in shown], wanted.key
    small = browser.execute_script(f"return [...document.querySelectorAll('{ROWS} small')].map(s => s.textContent)")
    assert sorted(small) == sorted(text for row in known(made) for c in COLUMNS if (text := c.interval(row)))
    assert browser.title.startswith("Ranking")


def test_numbers_are_written_by_the_page_as_by_the_tables(browser: Any, board: Path) -> None:
    open_ranking(browser, board)
    for number in (-1234.6, -12.34, -0.06, -0.04, 0, 0.04, 0.06, 99.96, 123.45, 3e7):
        for digits, signed in ((1, True), (0, True), (2, False)):
            shown = browser.execute_script(
                "return slim.format({digits: arguments[0], signed: arguments[1]}, arguments[2])", digits, signed, number
            )
            assert shown == decimal(digits, signed=signed)(number)


def test_bars_of_intervals_tell_good_rows_apart_beside_wrecked_ones(browser: Any, board: Path, made: list[Record]) -> None:
    open_ranking(browser, board, "#model=tiny-135m")
    bars = browser.execute_script(
        f"""
        const at = [...document.querySelectorAll('#cells thead th')].findIndex(th => th.textContent.trim() === arguments[0]);
        const percent = (style, name) => parseFloat(style.getPropertyValue(name));
        return Object.fromEntries([...document.querySelectorAll('{ROWS}')].flatMap((tr) => {{
          const bar = tr.children[at].querySelector('.interval');
          return bar ? [[tr.querySelector('th a').textContent, [percent(bar.style, '--low'), percent(bar.style, '--mark')]]] : [];
        }}));""",
        next(c.header for c in COLUMNS if c.key == "perplexity_delta_percent"),
    )
    lows = {row.label: row.perplexity_delta_low for row in known(made) if row.label in bars}
    good = sorted((name for name, low in lows.items() if low is not None and low < 500), key=lambda name: lows[name] or 0)
    starts = [bars[name][0] for name in good]
    assert len(good) > 10 and starts == sorted(set(starts)) and starts[-1] - starts[0] > 50
    assert bars["hqq(bits=2)"][0] == 100 and all(0 <= mark < starts[0] for _, mark in bars.values())


def test_sorting_by_keyboard_keeps_empty_values_last_and_says_so(browser: Any, board: Path) -> None:
    open_ranking(browser, board, "#model=tiny-135m")
    header = browser.find_element(By.XPATH, "//table[@id='cells']//thead//th[contains(., 'Tokens/s')]")
    target = browser.execute_script("return arguments[0].querySelector('[tabindex]') ?? arguments[0]", header)
    target.send_keys(Keys.ENTER)
    settle(browser)
    assert header.get_attribute("aria-sort") == "descending"
    values = column(browser, "Tokens/s")
    numbers = [float(v) for v in values if v != "–"]
    assert (
        numbers == sorted(numbers, reverse=True)
        and len(numbers) > 8
        and values == [*values[: len(numbers)], *["–"] * (len(values) - len(numbers))]
    )
    assert "sort=-decode_tokens_per_s" in browser.current_url
    target.send_keys(Keys.ENTER)
    settle(browser)
    numbers = [float(v) for v in column(browser, "Tokens/s") if v != "–"]
    assert numbers == sorted(numbers) and header.get_attribute("aria-sort") == "ascending"


def test_filters_search_and_a_shared_link(browser: Any, board: Path, made: list[Record]) -> None:
    open_ranking(browser, board)
    click(browser, "[data-facet=status] input[value=ok]")
    click(browser, "[data-facet=family] input[value=quantization]")
    browser.find_element(By.ID, "q").send_keys("tiny-1b gptq")
    wait(lambda: "q=tiny-1b" in browser.current_url)
    settle(browser)
    shown = pipelines(browser)
    assert sorted(shown) == ["gptq"] and browser.find_element(By.ID, "count").text.startswith(f"1 of {len(rows(made))}")
    click(browser, "#chooser input[value=disk_bytes]")
    shared = browser.current_url
    open_ranking(browser, board, "#" + shared.partition("#")[2])
    assert pipelines(browser) == shown and browser.current_url == shared
    assert browser.find_element(By.ID, "q").get_attribute("value") == "tiny-1b gptq"
    assert browser.execute_script("return document.querySelector('[data-facet=status] input[value=ok]').checked")
    assert "Disk MB" in browser.find_element(By.CSS_SELECTOR, "#cells thead").text
    click(browser, "#reset")
    settle(browser)
    assert len(pipelines(browser)) == len(rows(made))


def test_clearing_the_filters_keeps_apart_again_what_was_not_measured_alike(browser: Any, board: Path, made: list[Record]) -> None:
    open_ranking(browser, board, "#sort=perplexity&q=tiny")
    sets = len(headings(browser))
    click(browser, "#group")
    assert headings(browser) == []
    click(browser, "#reset")
    settle(browser)
    assert browser.find_element(By.ID, "group").is_selected() and len(headings(browser)) == sets == 2
    assert len(pipelines(browser)) == len(rows(made)) and browser.current_url.endswith("#sort=perplexity")


def test_failures_stay_visible_with_their_reason(browser: Any, board: Path, made: list[Record]) -> None:
    open_ranking(browser, board, "#model=tiny-135m")
    text = " ".join(browser.execute_script("return document.getElementById('cells').innerText").split())
    for row in known(made):
        assert row.reason is None or row.reason in text
        assert all(" ".join(flag.split()) in text for flag in folded(row.flags))
    assert "a/b/quality-1.json" in browser.find_element(By.TAG_NAME, "main").text


def test_hostile_text_is_shown_and_does_not_run(browser: Any, board: Path) -> None:
    open_ranking(browser, board)
    assert any(name.startswith("<img") for name in pipelines(browser))
    click(browser, f"{ROWS} th a[href]")
    assert browser.title != "run"
    assert browser.execute_script("return document.querySelectorAll('main img[src=x]').length") == 0


def test_the_budget_recommends_what_the_command_recommends(browser: Any, board: Path, made: list[Record]) -> None:
    plain = [record for record in made if record.cell.model == "tiny-1b"]
    for objective, limits in (
        ("quality", {"drop": 50, "speed": 21}),
        ("speed", {"drop": 40}),
        ("size", {"drop": 45}),
        ("quality", {"drop": 0}),
    ):
        fragment = "&".join(f"{name}={value}" for name, value in limits.items())
        open_ranking(browser, board, f"#model=tiny-1b&prefer={objective}&{fragment}")
        budget = Budget(max_drop=limits["drop"] / 100, min_speed=limits.get("speed"))
        expected = recommend(plain, "tiny-1b", budget, objective)  # type: ignore[arg-type]
        advice = browser.execute_script("return [...document.querySelectorAll('#advice a')].map(a => a.textContent)")
        assert expected.choice is not None
        assert advice == [c.row.label for c in (expected.choice, expected.runner_up) if c], (objective, limits)


def test_a_slider_changes_the_advice_and_the_address(browser: Any, board: Path) -> None:
    open_ranking(browser, board)
    before = browser.find_element(By.ID, "advice").text
    slider = browser.find_element(By.ID, "memory")
    slider.send_keys(Keys.HOME)
    for _ in range(20):
        slider.send_keys(Keys.ARROW_RIGHT)
    settle(browser)
    assert browser.find_element(By.ID, "advice").text != before and "memory=" in browser.current_url
    assert "MB" in slider.get_attribute("aria-valuetext")
    slider.send_keys(Keys.HOME)
    click(browser, "#reset")
    settle(browser)
    assert browser.find_element(By.ID, "advice").text == before


def test_a_cell_opens_from_the_table_and_from_the_chart(browser: Any, board: Path, made: list[Record]) -> None:
    open_ranking(browser, board, "#model=tiny-135m&q=gptq&status=ok")
    row = next(row for row in known(made) if row.label == "gptq")
    browser.find_element(By.LINK_TEXT, "gptq").click()
    wait(lambda: browser.current_url.endswith(names.cell(row)))
    assert row.command in browser.find_element(By.TAG_NAME, "main").text
    open_ranking(browser, board, "#model=tiny-135m")
    points = browser.execute_script("return document.querySelectorAll('#chart .point').length")
    assert points == sum(r.perplexity is not None and r.perplexity < 20 * 20.8 and r.weight_bytes is not None for r in known(made))
    browser.execute_script("document.querySelector('#chart .point').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    wait(lambda: "/cell/" in browser.current_url)


def test_advice_and_chart_name_the_machine_that_they_speak_of(browser: Any, tmp_path: Path) -> None:
    there = [Spec(name, "quantization", loss=1.3, bits=4.25, cpu="Another CPU") for name in ("rtn", "awq", "gptq")]
    open_ranking(browser, written(tmp_path, [record for spec in (Spec(), *there) for record in records(spec)]))
    chart = browser.find_element(By.CSS_SELECTOR, "#chart svg").get_attribute("aria-label")
    told = [browser.find_element(By.ID, name).text for name in ("advice", "plotted")]
    assert all("tiny-135m · wiki · Another CPU" in text for text in (chart, *told))


def test_static_tables_sort_with_empty_values_last(browser: Any, board: Path) -> None:
    browser.get((board / names.model("tiny-135m")).as_uri())
    header = wait(lambda: browser.find_elements(By.XPATH, "//table[contains(@class, 'dataTable')]//thead//th[contains(., 'Δ')]"))[0]
    for order in ("ascending", "descending"):
        header.click()
        wait(lambda order=order: header.get_attribute("aria-sort") == order)
    values = browser.execute_script("return [...document.querySelectorAll('tbody tr')].map(tr => tr.children[2].dataset.order)")
    numbers = [float(v) for v in values if v]
    assert numbers == sorted(numbers, reverse=True) and not any(values[len(numbers) :]) and len(numbers) > 8


def test_the_theme_can_be_changed_and_is_remembered(browser: Any, board: Path) -> None:
    open_ranking(browser, board)
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(paper)
    click(browser, "#theme")
    assert browser.execute_script(paper) != light
    browser.get((board / "guide.html").as_uri())
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    click(browser, "#theme")
    assert browser.execute_script(paper) == light


def test_controls_are_light_where_the_reader_chose_light_on_a_dark_system(browser: Any, board: Path) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        open_ranking(browser, board)
        browser.execute_script("delete document.documentElement.dataset.theme")
        controls = "return getComputedStyle(document.getElementById('group')).colorScheme"
        seen = [browser.execute_script(controls)]
        click(browser, "#theme")
        seen.append(browser.execute_script(controls))
    finally:
        browser.execute_script("localStorage.clear()")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme | {"value": "light"}]})
    assert seen == ["dark", "light"]


def test_figures_open_from_the_navigation_and_are_framed_in_both_themes(browser: Any, board: Path) -> None:
    open_ranking(browser, board)
    browser.find_element(By.CSS_SELECTOR, "nav[aria-label=Pages]").find_element(By.LINK_TEXT, "Figures").click()
    wait(lambda: browser.current_url.endswith("figures.html"))
    assert browser.find_element(By.CSS_SELECTOR, "nav a[aria-current=page]").text == "Figures"
    drawn = wait(lambda: browser.find_elements(By.CSS_SELECTOR, "figure.drawn img"))
    assert len(drawn) == len(list(board.rglob("*.svg"))) > 20
    wait(lambda: all(image.get_property("naturalWidth") > 0 for image in drawn))
    for theme in ("light", "dark"):
        browser.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
        frames = browser.execute_script(
            "return [...document.querySelectorAll('figure.drawn .scroll')].map(f => getComputedStyle(f).backgroundColor)"
        )
        assert set(frames) == {"rgb(255, 255, 255)"}, theme
    contents = browser.find_elements(By.CSS_SELECTOR, "nav.contents a")
    contents[-1].click()
    assert browser.find_element(By.CSS_SELECTOR, "h2:target").text == contents[-1].text


def test_a_figure_is_wider_than_a_phone_and_scrolls_in_its_frame(browser: Any, board: Path) -> None:
    screen(browser, 390, 844)
    try:
        browser.get((board / "figures.html").as_uri())
        settle(browser)
        inner, outer, focusable = browser.execute_script(
            "const f = document.querySelector('figure.drawn .scroll'); return [f.scrollWidth, f.clientWidth, f.tabIndex]"
        )
        assert outer <= 390 < 600 < inner and focusable == 0
    finally:
        screen(browser, 1400, 1000)


@pytest.fixture
def on_paper(browser: Any) -> Iterator[Any]:
    """The browser as a printer sees it: landscape letter paper, in its margins."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": scheme})
    screen(browser, 965, 700)
    yield browser
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme[0] | {"value": "light"}]})
    screen(browser, 1400, 1000)


def visible(browser: Any, selector: str) -> list[str]:
    return [found.tag_name for found in browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]


def test_paper_has_no_controls_and_every_row_of_the_ranking(on_paper: Any, board: Path, made: list[Record]) -> None:
    open_ranking(on_paper, board)
    on_paper.execute_script("document.documentElement.dataset.theme = 'dark'")
    assert not visible(on_paper, "nav, button, select, input, #budget, .dt-paging")
    assert visible(on_paper, "#count") and visible(on_paper, "#chart svg") and visible(on_paper, ".flag") and visible(on_paper, ".tag")
    assert on_paper.execute_script("return getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    on_paper.execute_script("DataTable.tables({api: true}).page.len(10).draw()")
    assert len(pipelines(on_paper)) == 10
    on_paper.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert len(pipelines(on_paper)) == len(rows(made))
    on_paper.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert len(pipelines(on_paper)) == min(50, len(rows(made)))


@pytest.mark.parametrize("kind", PAGES)
def test_nothing_is_cut_off_on_paper(on_paper: Any, board: Path, made: list[Record], kind: str) -> None:
    on_paper.get(address(board, made, kind).as_uri())
    settle(on_paper)
    assert on_paper.execute_script("return document.documentElement.scrollWidth") <= 965
    ends = on_paper.execute_script("return [...document.querySelectorAll('table, img')].map(e => e.getBoundingClientRect().right)")
    assert ends and max(ends) <= 965
    heads = on_paper.execute_script("return [...document.querySelectorAll('thead')].map(e => getComputedStyle(e).display)")
    assert set(heads) <= {"table-header-group"} and not visible(on_paper, "nav, button, .formats")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", PAGES)
def test_axe_finds_nothing_serious(browser: Any, board: Path, made: list[Record], kind: str, theme: str) -> None:
    axe_core = pytest.importorskip("axe_core_python")
    script = (Path(axe_core.__path__[0]) / "axe.min.js").read_text(encoding="utf-8")
    browser.get(address(board, made, kind).as_uri())
    if kind == "ranking":
        wait(lambda: browser.execute_script("return document.documentElement.classList.contains('ready')"))
    browser.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
    settle(browser)
    browser.execute_script(script)
    found = browser.execute_async_script("axe.run({resultTypes: ['violations']}).then(arguments[0])")
    serious = [
        (violation["id"], [node["html"][:160] for node in violation["nodes"][:3]])
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert found["passes"] and not serious


@pytest.mark.parametrize("kind", PAGES)
def test_a_phone_needs_no_sideways_scrolling(browser: Any, board: Path, made: list[Record], kind: str) -> None:
    screen(browser, 390, 844)
    try:
        browser.get(address(board, made, kind).as_uri())
        settle(browser)
        wide, high = browser.execute_script("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert wide <= 390 and high > 844
    finally:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        )


def test_the_skip_link_comes_first_and_leads_to_the_content(browser: Any, board: Path) -> None:
    open_ranking(browser, board)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the content"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "main"
