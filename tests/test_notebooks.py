"""Notebooks 01 to 05 are papers: abstract with computed verdict, numbered equations, captions, limitations, sliders."""

import ast
import itertools
import re

import nbformat
import pytest

from lib.commands import try_it
from lib.pipeline.code import is_interactive
from lib.report.captions import CAPTIONS
from lib.report.claims import load_results
from lib.report.figures import defensive, diffpure, diffusion_distillation, kd, robust_distillation
from lib.utils.code_hash import SOURCES
from lib.utils.files import ROOT

EXPERIMENTS = ("kd", "dd", "rd", "diff", "dp")
FIGURES = dict(zip(EXPERIMENTS, (kd, defensive, robust_distillation, diffusion_distillation, diffpure)))
EQUATION = re.compile(r"\$\$.*?\$\$", re.DOTALL)


@pytest.fixture(params=EXPERIMENTS)
def experiment(request):
    return request.param


@pytest.fixture
def cells(experiment):
    return nbformat.read(ROOT / SOURCES[experiment], as_version=4).cells


def code_of(cells, interactive: bool) -> list:
    return [c for c in cells if c.cell_type == "code" and is_interactive(c) == interactive]


def prose_of(cells) -> str:
    return "\n".join(c.source for c in cells if c.cell_type == "markdown")


def texts_given_to(cells, function: str) -> list[str]:
    """The string arguments of all calls of a function."""
    calls = (node for c in cells for node in ast.walk(ast.parse(c.source)) if isinstance(node, ast.Call))
    named = (node for node in calls if getattr(node.func, "attr", getattr(node.func, "id", "")) == function)
    return [a.value for node in named for a in node.args if isinstance(a, ast.Constant)]


def test_the_abstract_comes_first_and_its_verdict_is_computed(experiment, cells):
    assert "**Abstract.**" in cells[0].source and is_interactive(cells[1])
    ids = texts_given_to(cells[1:2], "abstract_verdicts")
    results = {row["id"]: row for row in load_results("digits")}
    assert ids and all(name.startswith(f"{experiment}.") for name in ids)
    text = try_it.abstract_verdicts(*ids).data
    assert text.count("\n- ") == len(ids)
    for name in ids:
        assert f"**{results[name]['verdict']}**: {results[name]['statement']}" in text


def test_no_result_is_typed(cells):
    assert set(re.findall(r"[\d.]+ ?%", EQUATION.sub("", prose_of(cells)))) <= {"95 %", "99.9 %"}  # confidence levels


def test_equations_are_numbered_and_few(cells):
    prose = prose_of(cells)
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", prose)]
    assert numbers == list(range(1, len(numbers) + 1)) and 4 <= len(numbers) <= 8
    assert len(numbers) == len(EQUATION.findall(prose))


def test_it_is_short(cells):
    assert len(EQUATION.sub(" ", prose_of(cells)).split()) <= 700


def test_every_figure_has_a_caption_after_it(experiment, cells):
    captioned = [name for name in texts_given_to(code_of(cells, True), "caption_text") if name != experiment]
    assert sorted(captioned) == sorted(FIGURES[experiment].FIGURES) and experiment in CAPTIONS
    drawing = re.compile(r"figures\.\w+\(\[?record|FIGURES\[")
    for before, after in itertools.pairwise(cells):
        if before.cell_type == "code" and drawing.search(before.source):
            assert "caption_text(" in after.source, before.id


def test_it_ends_with_limitations_and_something_to_try(cells):
    headings = re.findall(r"(?m)^## (.+)$", prose_of(cells))
    assert headings[-2:] == ["Limitations", "Try it yourself"]
    assert is_interactive(cells[-1]) and "explore" in cells[-1].source


def test_there_are_no_outputs(cells):
    assert not any(c.outputs or c.execution_count for c in cells if c.cell_type == "code")


def test_links_lead_somewhere(experiment, cells):
    for link in re.findall(r"\]\(([^)]+)\)", prose_of(cells)):
        assert ((ROOT / SOURCES[experiment]).parent / link).is_file(), link


def test_cells_run_by_hand_alone_give_the_pipeline_nothing(cells):
    """Without them every other cell finds the same names: none that it reads is set by them."""
    set_by_hand, read = set(), set()
    for cell in code_of(cells, True):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                set_by_hand.add(node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                set_by_hand |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for cell in code_of(cells, False):
        tree = ast.parse(cell.source)
        read |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert set_by_hand and not set_by_hand & read
