"""What the documentation takes from the repository: notebooks, links, thresholds, docstrings, formulas, references."""

import json
import re
from itertools import chain

import pytest
import yaml

from lib.evaluation.thresholds import CHECKS
from lib.pipeline import documentation
from lib.utils.files import ROOT

BIB = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
ENTRIES = {entry[0]: entry[1] for entry in re.findall(r"(?ms)^@\w+\{(\w+),\n(.*?)^\}", BIB)}
NAMES = {"TRADES": "zhang2019", "RSLAD": "zi2021"}  # claims that name a method in place of its authors
CITATION = re.compile(
    r"(?<![\w.-])([A-Z][\w-]+(?:-[A-Z]\w+)?)(?: et al\.| and ([A-Z][a-z]+)|, [A-Z]\w+(?:,| and) [A-Z]\w+)? "
    r"\(?((?:19|20)\d\d)[ab]?\b"
)


@pytest.fixture
def repository(tmp_path):
    """A small repository: a notebook with runs of two seeds, a notebook without one, two pages."""
    for folder in ("docs/leaderboard", "notebooks", "data/digits/runs", "data/digits/bench", "figures/digits", "lib"):
        (tmp_path / folder).mkdir(parents=True)
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "[next](02_b.ipynb) `[not](x.md)`"]},
        {"cell_type": "code", "source": "1", "outputs": []},
    ]
    for name in ("notebooks/01_a", "notebooks/02_b", "data/digits/runs/01_a-s20", "data/digits/runs/01_a-s3"):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    for name in ("data/digits/claims", "data/digits/bench/README", "data/digits/bench/onnx", "docs/leaderboard/README"):
        (tmp_path / f"{name}.md").write_text("# T\n", encoding="utf-8")
    (tmp_path / "data" / "pretrained").mkdir()
    (tmp_path / "data" / "pretrained" / "README.md").write_text("# T\n", encoding="utf-8")
    (tmp_path / "figures" / "digits" / "captions.md").write_text("![f](f.png)\n", encoding="utf-8")
    for name in ("figures/digits/f.png", "lib/m.py", "lib/n.py", "LICENSE"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_the_lowest_seed_is_shown_and_else_the_notebook(repository):
    shown = documentation.page_sources(repository)
    assert shown["experiments/01_a.ipynb"] == repository / "data/digits/runs/01_a-s3.ipynb"
    assert shown["experiments/02_b.ipynb"] == repository / "notebooks/02_b.ipynb"
    assert shown["experiments/claims.md"] == repository / "data/digits/claims.md"


def test_git_has_a_run_of_every_experiment():
    sources = documentation.page_sources()
    assert all(source.is_file() for source in sources.values())
    runs = [page for page, source in sources.items() if source.parent.name == "runs"]
    assert len(runs) == 6 and len(sources) == 12


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("[a](../notebooks/01_a.ipynb)", "[a](../experiments/01_a.ipynb)"),
        ("[a `b`](../data/digits/claims.md#t)", "[a `b`](../experiments/claims.md#t)"),
        ("[a](leaderboard/README.md)", "[a](../leaderboard/README.md)"),
        ("[a](../lib/m.py), [b](../lib/n.py)", "[a](../api/lib.m.rst), [b](../../lib/n.py)"),
        ("![a](../figures/digits/f.png)", "![a](../../figures/digits/f.png)"),
        ("[![a](../LICENSE)](../notebooks/02_b.ipynb)", "[![a](../../LICENSE)](../experiments/02_b.ipynb)"),
        ("see [`runs`](../data/digits/runs).", "see `runs`."),
        ("[a](https://a.org/b.md) [b](#c)", "[a](https://a.org/b.md) [b](#c)"),
        ("`[a](../LICENSE)`\n```\n[a](../LICENSE)\n```\n", "`[a](../LICENSE)`\n```\n[a](../LICENSE)\n```\n"),
    ],
)
def test_links_lead_to_pages(repository, link, there):
    moved = documentation.move_links(link, repository / "docs" / "x.md", "tutorials/x.md", ("lib.m",), repository)
    assert moved == there


def test_a_page_is_the_notebook_as_it_is_now_with_the_outputs_of_its_run(repository):
    def cell(kind, source, tags=(), **more):
        return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}, **more}

    code = [cell("code", "p = 1", ["parameters"], outputs=[]), cell("code", "print(p)", outputs=[])]
    injected = cell("code", "p = 2", ["injected-parameters"], outputs=[])
    ran = [code[0], injected, code[1] | {"outputs": [{"output_type": "stream", "text": "2"}]}]
    plain, run = repository / "notebooks" / "03_c.ipynb", repository / "data/digits/runs/03_c-s7.ipynb"
    run.write_text(json.dumps({"cells": [cell("markdown", "# Old"), *ran]}), encoding="utf-8")
    by_hand = cell("code", "explore()", ["interactive"], outputs=[])
    code[0] = cell("code", "p = 3", ["parameters"], outputs=[])
    plain.write_text(json.dumps({"cells": [cell("markdown", "# New"), *code, by_hand]}), encoding="utf-8")
    shown = documentation.shown_notebook(run, repository)["cells"]
    assert [c["source"] for c in shown] == ["# New", "p = 3", "p = 2", "print(p)", "explore()"]
    assert [bool(c.get("outputs")) for c in shown] == [False, False, False, True, False]
    plain.write_text(
        json.dumps({"cells": [cell("markdown", "# New"), code[0], cell("code", "other()")]}), encoding="utf-8"
    )
    assert documentation.shown_notebook(run, repository)["cells"][0]["source"] == "# Old"  # nothing of it was run


def test_pages_are_staged_once_with_their_links_and_what_was_run(repository):
    written = documentation.stage_pages((), repository)
    assert all(path.is_relative_to(repository / "docs" / "experiments") for path in written)
    page = json.loads((repository / "docs" / "experiments" / "01_a.ipynb").read_text(encoding="utf-8"))
    assert page["cells"][0]["source"] == "# A\n[next](02_b.ipynb) `[not](x.md)`"
    assert "not executed" in page["cells"][1]["source"] and "01_a-s3" in page["cells"][1]["source"]
    assert (repository / "docs/experiments/captions.md").read_text("utf-8") == "![f](../../figures/digits/f.png)\n"
    before = {path: path.stat().st_mtime_ns for path in written}
    documentation.stage_pages((), repository)
    assert {path: path.stat().st_mtime_ns for path in written} == before


def test_the_page_of_sanity_checks_has_every_check_with_the_codes_own_thresholds():
    text = (ROOT / "docs" / "sanity_checks.md").read_text(encoding="utf-8")
    page = documentation.add_thresholds(text)
    for name, check in CHECKS.items():
        section = page.partition(f"### {name}\n")[2].partition("###")[0]
        assert check.advice in section and check.source in section and check.reason in section
    assert "Red above 0.03" in page and "1 / number of classes" in page
    assert re.findall(r"(?m)^## .*", page) == re.findall(r"(?m)^## .*", text)
    with pytest.raises(ValueError, match="got a difference in zero gradients"):
        documentation.add_thresholds(text.replace("### zero gradients", "#### zero gradients"))


def test_tables_of_docstrings_are_those_of_restructuredtext():
    lines = ["Text.", "", "| a | b |", "|---|---|", "| `c` | - |", "- `f(x, **options)`", "**settings: kept"]
    assert documentation.rst_docstring(lines) == [
        *("Text.", "", "", ".. list-table::", "   :header-rows: 1", ""),
        *("   * - a", "     - b", "   * - `c`", r"     - \-", ""),
        *(r"- `f(x, \*\*options)`", "**settings: kept"),
    ]


def test_formulas_are_mathml_without_unknown_commands():
    pytest.importorskip("latex2mathml")
    shown = documentation.math_ml(r"h = \arg\max_k f_k \tag{1}", block=True)
    assert shown.startswith('<div class="math-block"><math') and "<span>(1)</span>" in shown and "\\" not in shown
    assert documentation.math_ml("T^2").startswith("<math") and "msup" in documentation.math_ml("T^2")
    with pytest.raises(ValueError, match=r"got \\unheard in"):
        documentation.math_ml(r"\unheard x")


def cited_works():
    """Every author and year that code, notebooks and claims name."""
    files = chain((ROOT / "lib").rglob("*.py"), (ROOT / "notebooks").glob("*.ipynb"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    claims = yaml.safe_load((ROOT / "lib" / "report" / "claims.yaml").read_text(encoding="utf-8"))
    texts += [claim["published"]["reference"] for claim in claims if claim["published"]]
    works = {
        (m[1], m[3]) for text in texts for m in CITATION.finditer(" ".join(text.split())) if m[0][len(m[1])] == " "
    }
    return works, {name for name in NAMES if any(text == name for text in texts)}


def known(author, year):
    """Say whether the bibliography has a work of an author and year."""
    return any(
        re.search(rf"\b{author}\b", text.partition("title")[0]) and f"{{{year}}}" in text for text in ENTRIES.values()
    )


def test_the_bibliography_has_what_the_repository_cites():
    works, names = cited_works()
    assert len(works) > 30
    assert {f"{author} {year}" for author, year in works if not known(author, year)} == set()
    assert {NAMES[name] for name in names} <= ENTRIES.keys()
    arxiv = {
        m for path in (ROOT / "lib").rglob("*.py") for m in re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text())
    }
    assert {number for number in arxiv if number not in BIB} == set() and len(arxiv) > 10
    assert not known("Goodfellow", 1915) and not known("Nobody", 2015)


def test_every_entry_has_one_link():
    assert len(ENTRIES) == BIB.count("\n@") > 40
    links = [re.findall(r"url = \{(https://[\w.]+/[^}\s]+)\}", text) for text in ENTRIES.values()]
    assert all(len(link) == 1 for link in links) and len({link[0] for link in links}) == len(links)
