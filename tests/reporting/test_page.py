"""The report in a real browser: every example is reached, by everybody, on every screen and on paper."""

import base64
import csv
import json
import math
import re
import zlib
from dataclasses import replace

import pytest
from selenium.webdriver.common.keys import Keys

from lightning_dtda import suggest_removals
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.reporting import report
from lightning_dtda.reporting.formatting import counts, p_value, supported
from tests.reporting.attributions import EXAMPLES, PNG, QUERIES, make_attribution, many, suggestible, truth_of
from tests.reporting.browsing import Page, chromium
from tests.reporting.page import data_of, rows_of

pytestmark = pytest.mark.browser
DIFFERENCES = ("mean", "spread", "wasserstein")
VIEWS = ("query", "queries", "examples", "retrained", "suggestion")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def session(tmp_path_factory, downloads):
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as session:
        yield session


@pytest.fixture
def browser(session):
    yield session
    session.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture(scope="module")
def shown():
    """An attribution whose examples have pictures, texts and features, one of them with markup in its text."""
    examples = {
        11: Shown("patient 11", "ill", PNG, "a <b>text</b>", (("age", "54"), ("bmi", "21"))),
        23: Shown(label="=well", text="another"),
    }
    queries = {7: Shown("the second", label="ill", image=PNG, prediction="well")}
    return replace(suggestible(), gallery=Gallery(examples, queries))


@pytest.fixture(scope="module")
def path(shown, tmp_path_factory):
    """A report with everything that a report can have."""
    suggestion = suggest_removals(shown, k=3, goal="reduce_variance", queries=[2])
    truth = truth_of(shown, (tuple(sorted(suggestion.removed)), (11,), (23,), (1, 2)), error=0.01)
    return report(shown, tmp_path_factory.mktemp("page") / "report.html", truth=truth, suggestion=suggestion)


@pytest.fixture
def page(browser, path):
    return Page(browser, path)


def test_the_table_shows_numbers_with_the_digits_that_their_intervals_support(page, path):
    for position, (number, difference) in [(p, d) for p in range(3) for d in enumerate(DIFFERENCES)]:
        page.go(view="query", q=QUERIES[position], d=difference)
        rows = rows_of(data_of(path), position, number)[:10]
        unknown = {"most": math.inf}
        rows = [{n: unknown.get(n, math.nan) if v is None else v for n, v in row.items()} for row in rows]
        texts = [supported(row["influence"], row["low"], row["high"]) for row in rows]
        assert page.column("rank") == [str(row["rank"]) for row in rows]
        # the column of the plots has the same field, and no text
        assert [text for text in page.column("influence") if text] == [influence for influence, _, _ in texts]
        expected = [
            f"{low} to {high}" if math.isfinite(row["low"]) else low
            for row, (_, low, high) in zip(rows, texts, strict=True)
        ]
        assert page.column("low") == expected
        assert page.column("p") == [p_value(row["p"]) for row in rows]
        assert page.column("significant") == ["✓ yes" if row["significant"] else "~ unclear" for row in rows]
        if difference != "wasserstein":
            assert page.column("fewest") == [counts(row["fewest"], row["most"]) for row in rows]


def test_the_first_screen_answers_which_examples_whether_they_are_real_and_what_to_do(page):
    page.screen(1440, 900)
    page.go(view="query", q=7, d="mean")
    bottom = page.js("return document.querySelector('.next').getBoundingClientRect().bottom")
    assert bottom <= 900
    assert page.texts("#asked h2") == ["The second"]
    assert page.texts("#asked dd") == ["ill", "well"]
    [first, *others] = page.texts("#cards li")
    assert first.startswith("patient 11\n✓ significant\nWithout it, the mean loss falls (") or first.startswith(
        "Patient 11\n"
    )
    assert "a <b>text</b>" in first
    assert len(others) == 4
    assert all("~ may be seed noise" in text for text in others)
    assert page.js("return document.querySelector('#cards img').naturalWidth") == 1


def test_search_finds_by_name_label_and_text(page):
    page.go(view="query", q=4, d="mean")
    [search] = page.all("#table input[type=search]")
    for words, found in (
        ("patient", ["patient 11"]),
        ("ILL patient", ["patient 11"]),
        ("another", ["23"]),
        ("nothing", []),
    ):
        search.clear()
        search.send_keys(words)
        page.until(lambda found=found: page.column("name") == found)
    search.clear()
    search.send_keys("2", Keys.BACKSPACE)
    page.until(lambda: len(page.column("name")) == 10)


def test_only_significant_ones_can_be_listed(page, shown):
    page.go(view="query", q=9, d="spread")
    page.click("#table input[type=checkbox]")
    expected = shown.significant("spread")[2].nonzero()[:, 0].tolist()
    page.until(lambda: page.column("name") == [str(number) for number in expected])


def test_columns_sort_up_and_down_by_a_click_on_their_heads(page, path):
    page.go(view="query", q=4, d="mean")
    p = [row["p"] for row in rows_of(data_of(path), 0, 0)]
    values = sorted(value for value in p if value is not None)
    [head] = [head for head in page.all("#table .head") if head.text == "p"]
    head.click()
    page.until(lambda: page.column("p") == [p_value(value) for value in values[:10]])
    head.send_keys(Keys.ENTER)
    page.until(lambda: page.column("p") == [p_value(value) for value in values[::-1][:10]])


def test_every_example_is_reached_page_by_page(page):
    page.go(view="query", q=4, d="mean")
    seen = page.column("rank")
    for _ in range(3):
        [following] = [button for button in page.all("#table .tabulator-page") if button.text == "Next"]
        following.click()
        seen += page.column("rank")
    assert [int(rank) for rank in seen] == list(range(1, EXAMPLES + 1))


def test_a_link_leads_to_a_query_a_difference_and_an_example(page, shown):
    page.go(view="query", q=9, d="spread", e=17)
    assert page.texts("#chosen h2") == ["Example 17"]
    predicted = shown.predict([17])[:, 2].tolist()
    drawn = [y for trace in page.figure("without")[:2] for y in trace["y"] if y is not None]
    # four digits of the changes
    assert sorted(drawn) == pytest.approx(sorted([*shown.baseline[:, 2].tolist(), *predicted]), rel=1e-4)
    assert "chosen" in page.js("return document.querySelector('.tabulator-row.chosen').className")


def test_the_back_button_goes_back(page):
    page.go(view="query", q=4, d="mean")
    page.click("#next")
    page.until(lambda: page.shown()["q"] == "7")
    page.click(".differences [data-difference=spread]")
    page.until(lambda: page.shown()["d"] == "spread")
    page.click("#table a.pick", 3)
    chosen = page.until(lambda: page.shown().get("e"))
    page.click(".views [data-view=examples]")
    page.until(lambda: page.shown()["view"] == "examples")
    page.session.back()
    page.until(lambda: page.shown() == {"view": "query", "q": "7", "d": "spread", "e": chosen})
    page.session.back()
    page.session.back()
    page.until(lambda: (page.shown()["q"], page.shown()["d"]) == ("7", "mean"))
    page.session.back()
    page.until(lambda: page.shown()["q"] == "4")


def test_previous_and_next_end_with_the_queries(page):
    page.go(view="query", q=4, d="mean")
    assert not page.session.find_element("id", "previous").is_enabled()
    page.go(view="query", q=9, d="mean")
    assert not page.session.find_element("id", "next").is_enabled()


def test_a_link_to_something_that_is_not_there_shows_the_page_all_the_same(page):
    page.js("location.hash = 'view=nothing&q=5&d=unknown&e=4000'")
    page.until(lambda: page.shown()["view"] == "query")
    assert page.column("rank")[0] == "1"
    assert page.severe() == []


def test_what_is_shown_can_be_downloaded_as_csv(page, path, downloads):
    page.go(view="query", q=9, d="mean")
    [button] = [button for button in page.all("#table button") if button.text == "Download CSV"]
    button.click()
    page.until(lambda: (downloads / "query-9-mean.csv").exists())
    page.until(lambda: (downloads / "query-9-mean.csv").stat().st_size)
    with (downloads / "query-9-mean.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    expected = rows_of(data_of(path), 2, 0)
    assert [float(row["influence"]) for row in rows] == [row["influence"] for row in expected]
    assert "'=well" in [row["label"] for row in rows], "no formula"
    ends = [(float(row["95 % interval"]), float(row["interval, upper end"])) for row in rows if row["p"]]
    assert ends == [(row["low"], row["high"]) for row in expected if row["p"] is not None]


def test_the_keyboard_reaches_cards_rows_and_commands(page):
    page.go(view="query", q=4, d="mean")
    wanted = page.js("return document.querySelectorAll('#cards a')[2].href")
    page.all("#cards a")[2].send_keys(Keys.ENTER)
    page.until(lambda: wanted.endswith(f"&e={page.shown().get('e')}"))
    second = page.js("return document.querySelectorAll('#table a.pick')[1].href")
    page.js("document.querySelector('#table a.pick').focus()")
    page.session.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert page.js("return document.activeElement.href") == second
    page.session.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: page.session.current_url == second)
    assert page.js("return document.activeElement.href") == second, "the keyboard stays where it was"
    reached = set()
    page.js("document.activeElement.blur()")
    for _ in range(80):
        page.session.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(
            page.js("const e = document.activeElement;return e.id || e.className || e.dataset.difference || e.tagName")
        )
    assert {"query", "next", "copy", "pick", "head", "spread", "SUMMARY"} <= reached
    page.session.find_element("id", "query").send_keys(Keys.TAB)
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_command_is_copied_or_selected(page):
    page.js("document.querySelector('.copy').click()")
    page.until(lambda: page.texts(".copy")[0] in ("Copied", "Selected"))


def test_queries_are_found_by_name_and_lead_to_themselves(page):
    page.go(view="queries", d="mean")
    assert page.column("name") == ["query 4", "the second", "query 9"]
    page.all("#queries-table input[type=search]")[0].send_keys("second")
    page.until(lambda: page.column("name") == ["the second"])
    page.click("#queries-table a.pick")
    page.until(lambda: (page.shown()["view"], page.shown()["q"]) == ("query", "7"))


def test_a_click_on_a_baseline_goes_to_its_query(page):
    page.go(view="queries", d="mean")
    page.figure("baseline")
    page.js("document.getElementById('baseline').emit('plotly_click', {points: [{data: {meta: 9}}]})")
    page.until(lambda: (page.shown()["view"], page.shown()["q"]) == ("query", "9"))


def test_examples_that_matter_everywhere_come_first(page, shown):
    page.go(view="examples", d="mean")
    number = shown.significant("mean").sum(0)
    assert page.column("name")[0] == "patient 11"
    assert [int(count) for count in page.column("count")] == number.sort(descending=True).values[:10].tolist()
    [heat] = page.figure("heat")
    assert heat["y"][0] == "patient 11"
    expected = shown.influence("mean")[:, 11].tolist()
    assert heat["z"][0] == pytest.approx(expected, rel=5.1e-6)
    assert heat["text"][0] == ["•"] * 3
    page.click("#examples-table a.pick")
    where = QUERIES[int(shown.influence("mean")[:, 11].abs().argmax())]
    page.until(lambda: page.shown() == {"view": "query", "q": str(where), "d": "mean", "e": "11"})


def test_retraining_is_drawn_beside_predictions(page, path):
    page.go(view="retrained", q=9, d="mean")
    _, points = page.figure("retrained")
    found = data_of(path)["retrained"]["differences"][0]
    assert points["x"] == found["predicted"][2]
    assert points["y"] == found["retrained"][2]
    assert page.column("name")[1] == "example patient 11"
    page.go(view="suggestion")
    assert page.texts("#suggested h3")[0].startswith("Example 23")
    assert "another" in page.texts("#suggested li")[0]


def test_the_page_makes_no_request_and_logs_no_error(page):
    for view in VIEWS:
        page.go(view=view)
    assert page.severe() == []
    messages = [json.loads(entry["message"])["message"] for entry in page.session.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_never_wider_than_the_screen(page, width, view):
    page.screen(width)
    page.go(view=view)
    page.js("document.querySelectorAll('details').forEach(each => { each.open = true })")
    page.until(lambda: page.js("return document.documentElement.scrollWidth") <= width)


def test_a_screen_that_turns_while_a_table_is_made_does_no_harm(page):
    page.go(view="query", q=4, d="mean")
    page.js("addEventListener('hashchange', () => dispatchEvent(new Event('resize')), { once: true })")
    page.go(view="examples")
    page.until(lambda: len(page.column("name")) == 10)
    assert page.severe() == []


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1440, True, id="1440-dark"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1440, False), (390, True), (390, False))),
    ],
)
def test_everybody_can_use_the_page(page, dark, width):
    page.screen(width)
    page.dark(dark)
    page.js("document.querySelectorAll('details').forEach(each => { each.open = true })")
    for view in VIEWS:
        for difference in DIFFERENCES if view == "query" else DIFFERENCES[:1]:
            page.go(view=view, d=difference)
            assert page.violations() == [], (view, difference)


def test_figures_follow_the_dark_mode(page):
    def background():
        return page.js("return getComputedStyle(document.querySelector('#without .main-svg')).backgroundColor")

    page.figure("without")
    light = background()
    page.dark()
    dark = page.until(lambda: background() != light and background())
    red, green, blue = (int(part) for part in re.findall(r"\d+", dark)[:3])
    assert max(red, green, blue) < 80
    page.dark(False)
    page.until(lambda: background() == light)


def test_a_printed_page_has_its_figures_whole_and_light(page):
    page.dark()
    page.js("""
        addEventListener('beforeprint', () => {
          const slot = document.getElementById('points');
          window.printed = {
            width: slot.querySelector('svg').getBoundingClientRect().width,
            colour: getComputedStyle(slot.querySelector('.main-svg')).backgroundColor,
          };
        })""")
    page.figure("points")
    printed = page.session.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    found = page.js("return window.printed")
    assert found["colour"] == "rgb(255, 255, 255)"
    assert found["width"] <= 718, "A4 is 794 pixels wide, less its margins"
    streams = re.findall(rb"stream\r?\n(.*?)endstream", base64.b64decode(printed["data"]), re.DOTALL)
    operators = b"".join(_inflated(stream) for stream in streams)
    assert operators.count(b" c\n") > 100, "the curves of markers"


def _inflated(stream):
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return b""


NAME = (
    "<b>m</b></script><script>document.title = 'taken over'</script><img src=x onerror=\"document.title='taken over'\">"
)


def test_names_are_shown_as_text_wherever_they_appear(browser, tmp_path):
    hostile = Shown(NAME, NAME, None, NAME, ((NAME, NAME),), NAME)
    gallery = Gallery(dict.fromkeys(range(EXAMPLES), hostile), dict.fromkeys(QUERIES, hostile))
    attribution = replace(make_attribution(measurement=NAME, ensemble=NAME), gallery=gallery)
    truth = truth_of(attribution, ((11,), (23,), (1, 2)), error=0.01)
    truth = replace(truth, about=truth.about | {"measurement": NAME})
    page = Page(browser, report(attribution, tmp_path / "report.html", truth=truth))
    for view in VIEWS[:4]:
        page.go(view=view)
        assert page.session.find_elements("css selector", "main b:not(.panel > p b, .panel > ul b), main img") == []
    assert NAME in page.texts("h1")[0]
    assert page.session.title.startswith("How does the <b>m</b>")
    page.go(view="query")
    assert NAME in page.texts("#cards blockquote")[0]
    axis = page.js("return document.querySelector('#without .ytitle').textContent")
    assert axis == f"{NAME} on the query"
    assert page.severe() == []


@pytest.mark.parametrize("runs", [1, 2])
def test_few_runs_are_shown_too(browser, tmp_path, runs):
    page = Page(browser, report(make_attribution(runs), tmp_path / "report.html"))
    for view in VIEWS[:3]:
        page.go(view=view)
    assert page.severe() == []


def test_groups_are_shown_with_members(browser, grouped, tmp_path):
    gallery = Gallery({number: Shown(text=f"text {number}") for number in range(3)})
    page = Page(browser, report(replace(grouped, gallery=gallery), tmp_path / "report.html"))
    [position] = [row["position"] for row in rows_of(data_of(tmp_path / "report.html"), 0, 0)[:1]]
    assert (
        page.go(view="query", q=4, d="mean").texts("#cards h3")[0]
        == f"<i>source {position}</i> ({1 + position % 3} examples)"
    )
    assert page.texts("#cards li:first-child blockquote") == [f"text {n}" for n in range(1 + position % 3)]
    assert page.severe() == []


@pytest.mark.slow
def test_200_queries_and_10000_examples_are_all_reached(browser, tmp_path):
    page = Page(browser, report(many(200, 10_000), tmp_path / "report.html", progress=False))
    assert len(page.js("return [...document.getElementById('query').options].map(each => each.value)")) == 200
    for query in (0, 123, 199):
        page.go(view="query", q=query, d="mean")
        assert len(page.column("rank")) == 10
    page.go(view="examples", d="mean")
    page.all("#examples-table input[type=search]")[0].send_keys("9876")
    page.until(lambda: page.column("name") == ["9876"])
    page.go(view="queries", d="mean")
    assert page.severe() == []
