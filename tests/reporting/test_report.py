"""The report as a file, and in a real browser."""

import html
import importlib
import json
import re
import shutil

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from lightning_dtda.reporting import report
from lightning_dtda.reporting.formatting import common_exponent, count, counts, number, p_value
from lightning_dtda.statistics import Mean, Quantile
from tests.reporting.attributions import QUERIES, make_attribution

_WIDTH = "return document.documentElement.scrollWidth"
_TABLE = "article:not([hidden]) .difference:not([hidden]) table"
DIFFERENCES = ("mean", "spread", "wasserstein")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,2000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # the driver's own path: selenium would look for one on the network
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as session:
        yield session


@pytest.fixture
def page(browser, attribution, tmp_path):
    return _open(browser, report(attribution, tmp_path / "report.html", k=5))


def _open(browser, path):
    browser.get_log("browser"), browser.get_log("performance")  # reading a log empties it
    browser.get(path.as_uri())
    WebDriverWait(browser, 30).until(lambda page: len(_figures(page)) == 5)
    return browser


def _figures(page):
    return page.find_elements("css selector", ".js-plotly-plot svg.main-svg:first-of-type")


def _key(difference):
    return f"difference-{DIFFERENCES.index(difference)}"


def _choose(page, query=None, difference=None):
    if query is not None:
        Select(page.find_element("id", "query")).select_by_visible_text(str(query))
    if difference is not None:
        page.find_element("css selector", f"button[data-difference={_key(difference)}]").click()


def _visible_rows(page):
    rows = page.find_elements("css selector", f"{_TABLE} tbody tr")
    return [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]


def _expected_rows(attribution, position, difference, k=5):
    top = attribution.top(k, difference, query=position)
    low, high = attribution.interval(difference)[:, position, top.example.tolist()]
    top["spread_influence"] = 100 * np.expm1(top["spread_influence"])
    if difference == "spread":
        top["influence"], low, high = top["spread_influence"], 100 * low.expm1(), 100 * high.expm1()
    exponents = {column: common_exponent(top[column]) for column in ("mean_influence", "spread_influence")}
    exponent = common_exponent([*top.influence, *low.tolist()])
    p = attribution.p_values(difference)[position]
    least, _, most = (each[position] for each in attribution.retrainings_needed(difference=difference))
    rows = []
    for at, row in enumerate(top.itertuples()):
        cells = [str(row.rank), str(row.example), number(row.influence, exponent)]
        cells += [f"{number(float(low[at]), exponent)} to {number(float(high[at]), exponent)}"]
        cells += [p_value(float(p[row.example]))]
        cells += [counts(float(least[row.example]), float(most[row.example]))]
        # what the influence is already is not said again
        if difference != "mean":
            cells += [number(row.mean_influence, exponents["mean_influence"])]
        if difference != "spread":
            cells += [number(row.spread_influence, exponents["spread_influence"])]
        rows.append(cells)
    return rows


@pytest.mark.browser
def test_the_tables_show_the_top_examples_of_the_chosen_query_and_difference(page, attribution):
    for position, query in enumerate(QUERIES):
        for difference in DIFFERENCES:
            _choose(page, query, difference)
            assert _visible_rows(page) == _expected_rows(attribution, position, difference)


@pytest.mark.browser
def test_the_page_makes_no_request_and_logs_no_error(page):
    for query in QUERIES:
        _choose(page, query, "wasserstein")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


@pytest.mark.browser
def test_choosing_an_example_shows_the_runs_without_it(page, attribution):
    _choose(page, QUERIES[1], "spread")
    example = attribution.top(5, "spread", query=1).example[2]
    page.find_element("css selector", f"{_TABLE} tr[data-example='{example}'] button").click()
    shown = page.execute_script(
        "const slot = document.querySelector('article:not([hidden]) .removal');"
        "return slot.calcdata.slice(0, 2).flat().map(point => point.y).filter(Number.isFinite)"
    )
    expected = [*attribution.baseline[:, 1].tolist(), *attribution.predict([example])[:, 1].tolist()]
    assert sorted(shown) == pytest.approx(sorted(expected))


@pytest.mark.browser
def test_previous_and_next_walk_through_the_queries(page):
    def chosen():
        return page.execute_script("return document.getElementById('query').selectedOptions[0].text")

    previous, following = page.find_element("id", "previous"), page.find_element("id", "next")
    assert not previous.is_enabled()
    following.click(), following.click()
    assert chosen() == str(QUERIES[2])
    assert not following.is_enabled()
    previous.click()
    assert chosen() == str(QUERIES[1])


@pytest.mark.browser
def test_a_click_on_a_baseline_goes_to_its_query(page):
    page.execute_script("document.getElementById('baseline').emit('plotly_click', {points: [{data: {meta: 2}}]})")
    assert page.find_element("css selector", "article:not([hidden])").get_attribute("data-query") == "2"


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_never_wider_than_the_screen(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    # figures follow the window a moment later
    WebDriverWait(page, 10).until(lambda page: page.execute_script(_WIDTH) <= width)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_names_are_shown_as_text_wherever_they_appear(browser, tmp_path):
    name = "<b>m</b></script><script>document.title = 'taken over'</script>"
    page = _open(browser, report(make_attribution(measurement=name, ensemble=name), tmp_path / "report.html"))
    assert name in page.find_element("css selector", "h1").text
    assert "taken over" in page.title
    assert page.title.startswith("How does the <b>m</b>")
    axis = page.find_element("css selector", "#baseline .ytitle")
    assert axis.text == f"{name} on the query"


def test_what_is_not_significant_is_muted_and_the_page_says_so(attribution, tmp_path):
    page = report(attribution, tmp_path / "report.html", k=40).read_text()
    rows = re.findall(r'<tr data-example="(\d+)"( class="unclear")?>', page)
    muted = [bool(unclear) for _, unclear in rows]
    significant = {difference: attribution.significant(difference) for difference in DIFFERENCES}
    expected = [
        not significant[difference][position, example]
        for position in range(len(QUERIES))
        for difference in DIFFERENCES
        for example in attribution.top(40, difference, query=position).example
    ]
    assert muted == expected
    assert True in muted
    assert False in muted
    assert "Grey: not significant among 40 examples (false discovery rate 5 %)" in page


def test_the_page_says_first_whether_influences_are_more_than_seed_noise(attribution, tmp_path):
    page = html.unescape(report(attribution, tmp_path / "report.html").read_text()).replace("\xa0", " ")
    found = page[page.index("Is it more than seed noise?") : page.index("How to read this")]
    numbers = {difference: attribution.significant(difference).sum(1).tolist() for difference in DIFFERENCES}
    assert set(numbers["mean"]) == {1}
    assert "On 3 of 3 queries, 1 of 40 examples has a significant mean influence (12 runs, " in found
    assert numbers["spread"] == [0, 1, 1]
    assert "On 2 of 3 queries, 1 of 40 examples has a significant spread influence (12 runs, " in found
    low, _, high = (each[:, 11].tolist() for each in attribution.retrainings_needed(difference="mean"))
    for ends in zip(low, high, strict=True):
        assert f"To confirm example 11: retrain {counts(*ends)} times without it, and the same number of times" in page


def test_where_there_is_no_interval_the_page_says_why_and_what_to_use(attribution, tmp_path):
    page = html.unescape(report(attribution, tmp_path / "report.html", differences=["variance"]).read_text())
    assert "interval <i>over seeds</i>" not in page
    assert "No interval is shown: no method holds its level with few runs. Use the spread influence" in page


def test_if_nothing_is_significant_the_page_says_how_many_runs_it_would_take(tmp_path):
    noise = make_attribution()
    noise.responses[..., [11, 23]] = noise.responses[..., [12, 24]]
    noise.responses[..., 30] += 0.0012
    noise.responses.mul_(1000)  # so that the runs cannot show that effects are small
    page = html.unescape(report(noise, tmp_path / "report.html").read_text()).replace("\xa0", " ")
    assert not noise.significant("mean").any()
    assert "No example has a significant mean influence on any of 3 queries with 12 runs (false discovery" in page
    p, (low, _, high) = noise.p_values("mean"), noise.runs_for_significance("mean")
    query, example = divmod(int(p.argmin()), 40)
    assert low[query, example] <= 12
    more = count(float(high[query, example]) - 12)
    assert f"The clearest is example {example} (p = {p.min():.2g}): up to {more} more runs would make it" in page
    assert "Cannot tell for 39 of 40 examples: with 12 runs, an effect is found with a probability of 80 %" in page


def test_other_differences_are_shown_with_a_sentence_and_a_unit(attribution, tmp_path):
    differences = ["energy", Quantile(0.1), Quantile(0.9), "tail", "gaussian_kl", Mean("median")]
    page = html.unescape(report(attribution, tmp_path / "report.html", k=2, differences=differences).read_text())
    for words in (
        "in the square root of the loss's unit",
        "change of the loss that 10 % of the runs do not exceed, on this query",
        "change of the loss that 90 % of the runs do not exceed, on this query",
        "change of the mean loss over the highest 10 % of the runs on this query",
        "in nats; a shift by one standard deviation is 0.5",
        "change of the loss, median over runs, on this query",
    ):
        assert words in page
    assert page.count('class="difference"') == len(QUERIES) * len(differences)
    keys = re.findall(r'<button type="button" data-difference="(.*?)"', page)
    assert len(set(keys)) == len(differences)


def test_the_page_says_what_was_asked_and_how_sure_it_is(attribution, tmp_path):
    page = report(attribution, tmp_path / "deep" / "report.html").read_text()
    for words in (
        "How does the loss on 3 queries change if one of 40 training examples is removed?",
        "giving it weight zero: batch order, batch size and the",
        "UnrolledDifferentiation (precision=float64)",
        "parameters 1.2e-06, gradients 2e-06",
        "change of the mean loss on this query if the example is removed",
    ):
        assert words in page
    assert "Caution" not in page


@pytest.mark.parametrize(
    ("runs", "caution"), [(1, "There is a single run"), (2, "There are only 2 runs"), (7, "7 runs")]
)
def test_few_runs_still_make_a_report_with_a_caution(runs, caution, tmp_path, recwarn):
    page = report(make_attribution(runs), tmp_path / "report.html").read_text()
    assert "Caution." in page
    assert caution in page
    assert not [warning for warning in recwarn if "Influences of" in str(warning.message)]


def test_of_too_many_queries_the_page_says_which_are_shown(attribution, tmp_path, monkeypatch):
    # the package's attribute of that name is the function
    monkeypatch.setattr(importlib.import_module("lightning_dtda.reporting.report"), "MOST_QUERIES", 2)
    page = report(attribution, tmp_path / "report.html").read_text()
    assert "2 of 3 queries are shown" in page
    assert page.count("<article") == 2


def test_a_report_is_of_the_trusted_runs(tmp_path):
    chaotic = make_attribution(chaotic=["seed-0002", "seed-0005"])
    chaotic.responses[[2, 5]] *= 1000
    page = report(chaotic, tmp_path / "report.html").read_text()
    assert "2 runs are left out of 12 as chaotic (seed-0002, seed-0005)" in page
    assert "over 10 runs" in page
    assert "Agreement between runs" in page


def test_ill_conditioned_runs_are_cautioned_against(tmp_path):
    diagnosis = {"seed-0002": {"finite_differences": 1e-6, "precision": 0.3}}
    estimator = {"class": "UnrolledDifferentiation", "precision": "recorded"}
    text = report(make_attribution(diagnosis=diagnosis, estimator=estimator), tmp_path / "report.html").read_text()

    assert "1 run is ill-conditioned (seed-0002)" in text
    assert "0.3 against double precision" in text


def test_the_adjoints_are_drawn(page):
    curves = page.execute_script("return document.querySelector('[data-figure=adjoint]').data.length")

    assert curves == 12


@pytest.mark.parametrize("norms", [{}, {"seed-0000": {}}], ids=["unknown", "of a forward sweep"])
def test_without_adjoints_there_is_no_empty_figure(tmp_path, norms):
    text = report(make_attribution(adjoint_norms=norms), tmp_path / "report.html").read_text()

    assert "How long an early change still matters" not in text


def test_groups_are_named_with_their_sizes(grouped, tmp_path):
    page = report(grouped, tmp_path / "report.html", k=4).read_text()
    rows = re.findall(
        r'<button type="button" title="show the runs without this group">(.*?)</button></td>\s*<td>(\d+)', page
    )
    tops = [grouped.top(4, difference, query=q) for q in range(len(QUERIES)) for difference in DIFFERENCES]
    expected = [(name, size) for top in tops for name, size in zip(top["removal"], top["size"], strict=True)]
    assert [(html.unescape(name), int(size)) for name, size in rows] == expected
    for words in (
        "if one of 40 groups of training examples is removed?",
        "measured after step 40 of 12 seeded runs",
        "Groups of training examples",
        "change of the mean loss on this query if the group is removed",
        "Which groups make the largest change of the mean loss?",
    ):
        assert words in page
    assert "<i>source" not in page
    # the figures that a click shows are there, by the group's position
    positions = {position for position, _ in re.findall(r'<tr data-example="(\d+)"( class="unclear")?>', page)}
    assert all(f'"without-{position}": ' in page for position in positions)
    assert "&quot;examples&quot;: [" not in page


def test_a_top_that_was_kept_is_reported_as_all_responses_are(attribution, tmp_path):
    of_all = report(attribution, tmp_path / "all.html", k=4, differences=["mean", "spread"]).read_text()
    kept = report(attribution.keep_top(4), tmp_path / "kept.html", k=4).read_text()
    # but for the last digits of p-values, which the titles have in full
    pages = [re.sub(r'<td title="[^"]*"', "<td", page) for page in (kept, of_all)]
    tables = [re.findall(r"<table.*?</table>", page, re.DOTALL) for page in pages]
    assert len(tables[0]) >= 2 * len(QUERIES)
    assert tables[0] == tables[1]
