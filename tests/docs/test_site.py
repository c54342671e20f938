"""The built site: no warning, no broken link, and in a browser no error and no request that leaves this machine."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from lib.utils.files import ROOT
from tests.commands import browser
from tests.docs.site_links import Links, broken_site_links, is_address

LEAST = 60  # pages of text, notebooks and modules


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once as `make docs` does, but where no other build is."""
    if any(find_spec(name) is None for name in ("sphinx", "myst_nb", "furo", "latex2mathml")):
        pytest.skip("no Sphinx: python -m lib.pipeline.environment --docs")
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--nitpicky"]
    command += ["-b", "html", "-d", folder / "doctrees", ROOT / "docs", folder / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= LEAST
    assert broken_site_links(site) == []


@pytest.mark.slow
def test_every_page_opens_without_error_and_asks_no_other_host(site, tmp_path):
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    with browser.served(site) as address, browser.opened(f"{address}index.html", tmp_path / "profile") as page:
        for name in pages:
            page.call("Page.navigate", url=address + name)
            page.wait(f"location.href === {address + name!r} && document.readyState === 'complete'")
            title = page.run("document.title")
            assert title and "no title" not in title.lower(), name
            assert page.errors == [], name
            assert not page.run("document.documentElement.scrollWidth > innerWidth"), f"{name} is too wide"
        leaving = {r for r in page.requests if not r.startswith((address, "data:", "blob:", "about:"))}
        assert leaving == set() and len(page.requests) > len(pages)

        page.call("Page.navigate", url=f"{address}experiments/00_quickstart.html")
        page.wait("document.readyState === 'complete' && document.querySelectorAll('math').length > 10")
        formulas = page.run("[...document.querySelectorAll('math')].map(m => [m.clientWidth, m.textContent])")
        assert all(width > 0 and "\\" not in text for width, text in formulas)

        page.call("Page.navigate", url=f"{address}search.html?q=robust_accuracy")
        page.wait("document.querySelectorAll('#search-results li').length > 3")
        assert all("Sphinx search tries" in text for text in page.errors)  # Sphinx's warning of names with dots


def test_a_broken_link_of_a_site_is_seen(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.html").write_text('<title>b</title><p id="x">b</p><img src="../c.png"><a href="#y">y</a>')
    (tmp_path / "index.html").write_text(
        '<a href="a/b.html#x">1</a><a href="a/b.html#z">2</a><a href="gone.html">3</a><a href="../up.html">4</a>'
        '<a href="https://arxiv.org/abs/1412.6572">5</a><a href="https://arxiv">6</a><a href="a%2Fb.html">7</a>'
        '<a href="#top">8</a><script src="no.js"></script>'
    )
    assert broken_site_links(tmp_path) == [
        "a/b.html: ../c.png",
        "a/b.html: #y",
        "index.html: a/b.html#z",
        "index.html: gone.html",
        "index.html: ../up.html",
        "index.html: https://arxiv",
        "index.html: no.js",
    ]
    assert Links("<title>a</title>").title and not Links("<p>a</p>").title
    assert is_address("mailto:a@b.org") and not is_address("ftp://a.org") and not is_address("https:// a.org")
