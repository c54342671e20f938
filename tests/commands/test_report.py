"""The page of an evaluation: one file that asks for nothing, with every value of the record and nothing made up."""

import copy
import json
import re

import matplotlib.pyplot as plt
import pytest

from lib.commands import evaluate
from lib.commands.check_meanings import MEANINGS
from lib.commands.measures import REPORTED, percent_interval
from lib.commands.report import draws_figure, read_record, report_page
from lib.evaluation.thresholds import CHECKS
from lib.utils.files import ROOT, read_json, write_json
from tests.commands.browser import CHROMIUM, opened

BALL = ("--data", "digits", "--eps", "0.1", "--images", "8")
ENTRY = ROOT / "docs/leaderboard/entries/digits-adaptive-1.json"
ROW = {"measured": 0.0, "flag": False, "source": "s", "advice": "a", "threshold": 0.5}
PNG = "data:image/png;base64,iVBORw0KGgo="


def test_the_page_is_written_by_evaluate_and_again_from_the_json(call, tmp_path, monkeypatch):
    rows = [{"check": name, **ROW} for name in CHECKS]
    rows[3] |= {"flag": True, "measured": 0.75, "advice": "use float64"}
    monkeypatch.setattr(evaluate, "run_checks", lambda *_: rows)
    page, again, record = (tmp_path / name for name in ("a.html", "b.html", "out.json"))
    arguments = ("digits/natural", "--purifier", "digits/adaptive-1", *BALL)
    code, text, _ = call("evaluate", *arguments, "--html", page, "--json", record)
    assert code == 3 and "RED float32 vs float64 gradients" in text  # a red check is a red mark
    assert call("report", record, again)[0] == 0 and page.read_bytes() == again.read_bytes()
    html, result = page.read_text(encoding="utf-8"), json.loads(record.read_text())
    for name in REPORTED:
        value, interval = percent_interval(result["measures"][name]).split(" ", 1)
        assert f"<b>{value}</b><span>{interval}" in html
    for part in (result["commit"], result["torch"], result["python"], "10 draws of each", "seed 0", "n = 8 images"):
        assert part in html
    assert f"{result['gradients_per_image']:.0f}\ngradient calls per image" in html
    assert html.count('class="state red"') == 1 and html.count('class="state"') == len(CHECKS) - 1
    assert "1 of 21 sanity checks" in html and "8 images, one noise" in html
    assert all(meaning.explanation in html for meaning in MEANINGS.values())
    pictures = [uri for row in result["pictures"] for uri in row["images"].values()]
    assert len(pictures) == 6 * 4 and all(uri in html for uri in pictures)
    assert sum(row["answers"]["clean"]["right"] for row in result["pictures"]) > 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_without_errors_and_asks_for_nothing(tmp_path):
    result = read_json(ENTRY) | {"checks": [{"check": name, **ROW} for name in CHECKS]}
    images = {"x": PNG, "δ": PNG, "x + δ": PNG}
    said = {name: {"right": 0.5, "most": 3} for name in ("clean", "matched")}
    result["pictures"] = [{"label": 3, "answers": said, "images": images}]
    result["name"] = "<script>fetch('http://127.0.0.1:9/')</script>"
    (tmp_path / "page.html").write_text(report_page(result), encoding="utf-8")
    address = (tmp_path / "page.html").as_uri()
    with opened(address, tmp_path / "profile", width=900) as page:
        page.wait("document.readyState === 'complete' && document.images.length === 5")
        assert page.run("document.querySelector('h1').textContent") == result["name"]  # text, no script
        assert page.run("document.querySelectorAll('#checks tr').length") == 1 + len(CHECKS)
        assert page.run("[...document.images].filter(i => i.className && i.naturalWidth > 300).length") == 2
        assert page.run("document.documentElement.scrollWidth") <= 900
        assert page.errors == [] and {r for r in page.requests if not r.startswith("data:")} == {address}


def test_older_records_and_deterministic_ones_have_a_page():
    html = report_page(read_json(ENTRY))
    assert "Not run: <code>python -m lib evaluate … --checks" in html and "Pictures" not in html
    assert "Accuracy by number of draws" in html
    natural = report_page(read_json(ENTRY.with_name("digits-natural.json")))
    assert "deterministic" in natural and "ten of ten" not in natural and "number of draws" not in natural
    assert not re.search(r'(?:src|href)="(?!data:)', html + natural)


def test_every_check_has_its_meaning():
    assert list(MEANINGS) == list(CHECKS)


def test_the_curve_goes_through_the_measures():
    result = read_json(ENTRY)
    figure = draws_figure(read_record(result, "the entry"))
    axes = figure.axes[0]
    for line, one, ten in zip(axes.lines, ("clean", "robust"), ("control", "worst_of_10"), strict=True):
        assert line.get_ydata()[0] == pytest.approx(100 * result["measures"][one]["value"])
        assert line.get_ydata()[9] == pytest.approx(100 * result["measures"][ten]["value"])
    plt.close(figure)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("measures", "control"), None, "measures.control: field required, got nothing there"),
        (("attacks",), {}, "attacks: dictionary should have at least 1 item"),
        (("outcomes", "correct", "clean"), None, "expected answers of the condition 'clean', got none"),
        (
            ("pictures",),
            [{"label": 1, "answers": {}, "images": {"x": "//a/b.png"}}],
            "string should match pattern",
        ),
        (("checks",), [{"check": "luck", **ROW}], "checks.0.check: input should be 'zero gradients'"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(call, tmp_path, path, value, message):
    result = copy.deepcopy(read_json(ENTRY))
    node = result
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    if value is None:
        del node[path[-1]]
    write_json(tmp_path / "out.json", result)
    code, _, said = call("report", tmp_path / "out.json", tmp_path / "page.html")
    assert code == 1 and message in said and "\n" not in said and not (tmp_path / "page.html").exists()
