"""The links of a built site: each leads to a file and a place of it; addresses on other hosts are not followed."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Links(HTMLParser):
    """What a page links to and loads, and the places on it that a link may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.places, self.title = [], {"", "top"}, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        self.title = self.title or tag == "title"
        for name in ("href", "src", "data"):
            if name in values and not values[name].startswith("data:"):
                self.links.append(values[name])


def is_address(link: str) -> bool:
    """Say whether a link to another host is written as an address."""
    parts = urlsplit(link)
    if parts.scheme == "mailto":
        return bool(re.fullmatch(r"[^@\s]+@[^@\s]+\.\w+", parts.path))
    return parts.scheme in ("http", "https") and bool(re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc))


def broken_site_links(site: Path) -> list[str]:
    """Return the links of a site's pages that lead nowhere, each with its page."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                right = is_address(link)
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                target = target / "index.html" if target.is_dir() else target
                places = pages[target].places if target in pages else None
                right = target.is_relative_to(site.resolve()) and target.is_file()
                right = right and (places is None or unquote(parts.fragment) in places)
            if not right:
                broken.append(f"{path.relative_to(site).as_posix()}: {link}")
    return broken
