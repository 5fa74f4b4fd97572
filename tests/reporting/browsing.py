"""A headless Chromium, and what tests do with a report in it."""

import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()


def chromium(profile, downloads):
    """Return a driver; skip the test without Chromium."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1440,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # the driver's own path: selenium would look for one on the network
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """A report in the browser."""

    def __init__(self, session, path):
        self.session = session
        session.get_log("browser"), session.get_log("performance")  # reading a log empties it
        session.get("about:blank")
        session.get(path.as_uri())
        self.until(lambda: self.js("return 'ready' in document.documentElement.dataset"))

    def js(self, script, *arguments):
        """Run a script; return its result."""
        return self.session.execute_script(script, *arguments)

    def until(self, condition):
        """Wait until a condition holds, and return its value."""
        return WebDriverWait(self.session, 30).until(lambda _: condition())

    def all(self, selector):
        """Return the visible elements of a selector."""
        return [found for found in self.session.find_elements("css selector", selector) if found.is_displayed()]

    def click(self, selector, number=0):
        """Click a visible element; a table may draw it again meanwhile."""

        def clicked():
            try:
                self.all(selector)[number].click()
            except (IndexError, StaleElementReferenceException):
                return False
            return True

        self.until(clicked)

    def texts(self, selector):
        """Return the texts of the visible elements of a selector, all of one moment."""
        found = self.js(
            "return [...document.querySelectorAll(arguments[0])].filter(each => each.checkVisibility())"
            ".map(each => each.innerText)",
            selector,
        )
        return [text.replace("\xa0", " ").strip() for text in found]

    def go(self, **state):
        """Follow a link to a state, and wait for its table."""
        self.js("location.hash = arguments[0]", "&".join(f"{key}={value}" for key, value in state.items()))
        wanted = {name: str(value) for name, value in state.items()}
        self.until(lambda: self.shown() | wanted == self.shown())
        return self

    def shown(self):
        """Return what the page says that it shows."""
        view = self.js("return document.querySelector('.views [aria-current=page]').dataset.view")
        difference = self.js("return document.querySelector('.differences [aria-current=true]').dataset.difference")
        found = {"view": view, "d": difference, "q": self.js("return document.getElementById('query').value")}
        example = self.js("return document.querySelector('.tabulator-row.chosen a.pick')?.href")
        return found | ({"e": example.partition("&e=")[2]} if example else {})

    def column(self, field):
        """Return the texts of a column of the visible table, on its current page."""
        return self.texts(f".tabulator-row .tabulator-cell[tabulator-field='{field}']")

    def figure(self, name):
        """Return the traces of a figure."""
        self.until(lambda: self.js(f"return document.getElementById('{name}').data?.length"))
        return self.js(f"return document.getElementById('{name}').data")

    def severe(self):
        """Return the errors in the browser's log."""
        return [entry["message"] for entry in self.session.get_log("browser") if entry["level"] == "SEVERE"]

    def screen(self, width, height=900):
        """Set the size of the screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def dark(self, wanted=True):
        """Set what the reader prefers."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
        self.session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def violations(self):
        """Return what axe finds: rule, and the first element."""
        self.js(AXE)
        return self.session.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document).then(found => done(found.violations.map(v => [v.id, v.nodes[0].html])))"
        )
