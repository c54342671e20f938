"""What the documentation takes from elsewhere in the repository: pages, links, the sanity checks, docstrings, formulas.

docs/conf.py calls this. Nothing is there twice: notebooks, claims and captions are copied when the pages are built, and
a link that leads to a file of the repository on its host leads to the page of that file on the site.
"""

import importlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath

from lib.evaluation.thresholds import CHECKS, Check
from lib.pipeline.code import INTERACTIVE
from lib.utils.files import ROOT, write_text

SHOWN_PROFILE = "digits"  # whose results are shown
FOLDER = "experiments"  # in docs/, of pages that come from elsewhere
LINK = r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*)\]\(<?(?P<link>[^)\s>]+)>?\)"
KEYWORDS = re.compile(r"(?<=\S )\*\*(?=\w)|(?<=\()\*\*(?=\w)")  # `f(**options)` in prose
CODE_OR_LINK = re.compile(rf"(?s:```.*?```)|{LINK}|`[^`\n]+`")


def executed_notebook(name: str, root: Path = ROOT) -> Path:
    """Return the executed run of a notebook that git has, of the lowest seed; the notebook itself where it has none."""
    runs = list((root / "data" / SHOWN_PROFILE / "runs").glob(f"{name}-s*.ipynb"))
    report = root / "data" / SHOWN_PROFILE / "runs" / f"{name}.ipynb"
    if runs:
        return min(runs, key=lambda path: int(path.stem.rpartition("-s")[2]))
    return report if report.is_file() else root / "notebooks" / f"{name}.ipynb"


def page_sources(root: Path = ROOT) -> dict[str, Path]:
    """Return the files of the repository that become pages, by the page's name, without those in docs/."""
    notebooks = sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))
    pages = {f"{FOLDER}/{name}.ipynb": executed_notebook(name, root) for name in notebooks}
    tables = {
        "claims": f"data/{SHOWN_PROFILE}/claims.md",
        "captions": f"figures/{SHOWN_PROFILE}/captions.md",
        "costs": f"data/{SHOWN_PROFILE}/bench/README.md",
        "onnx": f"data/{SHOWN_PROFILE}/bench/onnx.md",
        "weights": "data/pretrained/README.md",
    }
    return pages | {f"{FOLDER}/{name}.md": root / path for name, path in tables.items()}


def page_of(path: Path, modules: Sequence[str] = (), root: Path = ROOT) -> str | None:
    """Return the page of a file of the repository, relative to docs/; None where it has none.

    Args:
        path: of the file.
        modules: that have a page of their own.
        root: of the repository.
    """
    if path.parent == root / "notebooks":
        return f"{FOLDER}/{path.name}"
    if path.suffix == ".py" and (module := ".".join(path.relative_to(root).with_suffix("").parts)) in modules:
        return f"api/{module}.rst"
    if path.is_relative_to(root / "docs") and path.suffix in (".md", ".rst"):
        return path.relative_to(root / "docs").as_posix()
    return next((page for page, source in page_sources(root).items() if source == path), None)


def move_links(text: str, origin: Path, page: str, modules: Sequence[str] = (), root: Path = ROOT) -> str:
    """Return Markdown whose links to the repository's files lead to their pages, or to the files.

    Args:
        text: Markdown.
        origin: the file that it is from, to which its links are relative.
        page: where it is read, relative to docs/.
        modules: that have a page of their own.
        root: of the repository.

    Returns:
        The text; a link to a folder, which has no page, is its text alone.
    """
    place = root / "docs" / PurePosixPath(page).parent

    def moved(match: re.Match) -> str:
        image, words, link = match.group("image", "text", "link")
        if link is None:
            return match.group()
        words = CODE_OR_LINK.sub(moved, words)
        name, _, anchor = link.partition("#")
        path = Path(os.path.normpath(origin.parent / name))
        if re.match(r"[a-z]+:", link) or not name or not path.is_relative_to(root):
            return f"{image}[{words}]({link})"
        if path.is_dir():
            return words
        target = page_of(path, modules, root)
        to = os.path.relpath(root / "docs" / target if target else path, place).replace(os.sep, "/")
        return f"{image}[{words}]({to}{'#' if anchor else ''}{anchor})"

    return CODE_OR_LINK.sub(moved, text)


def shown_notebook(source: Path, root: Path = ROOT) -> dict:
    """Return a notebook as it is now, with what its run put out: a run is of the text that it began with.

    Outputs belong to cells of the same code; the values that the run injected stand after the parameters. A run of
    other code is shown as it was.
    """
    run, plain = (json.loads(path.read_text(encoding="utf-8")) for path in (source, original_of(source, root)))
    ran = {"".join(cell["source"]): cell for cell in run["cells"] if cell["cell_type"] == "code"}
    code = [cell for cell in plain["cells"] if cell["cell_type"] == "code"]
    apart = {INTERACTIVE, "parameters"}  # by hand alone, and defaults, in whose place the run has its own values
    computed = [cell for cell in code if not apart & set(cell.get("metadata", {}).get("tags", []))]
    if any("".join(cell["source"]) not in ran for cell in computed):
        return run
    for cell in code:
        cell["outputs"] = ran.get("".join(cell["source"]), cell).get("outputs", [])
    tags = [cell.get("metadata", {}).get("tags", []) for cell in plain["cells"]]
    injected = [cell for cell in run["cells"] if "injected-parameters" in cell.get("metadata", {}).get("tags", [])]
    place = next((k + 1 for k, some in enumerate(tags) if "parameters" in some), 0)
    plain["cells"][place:place] = injected
    return plain


def original_of(source: Path, root: Path = ROOT) -> Path:
    """Return the notebook of a run, or the notebook itself; a run whose notebook is gone stands for itself."""
    path = root / "notebooks" / f"{re.sub('-s[0-9]+$', '', source.stem)}.ipynb"
    return path if path.is_file() else source


def notebook_page(source: Path, page: str, modules: Sequence[str] = (), root: Path = ROOT) -> str:
    """Return a notebook as a page: its links moved, and below its head what kind of run is shown.

    Args:
        source: the notebook, or a run of it.
        page: where it is read, relative to docs/.
        modules: that have a page of their own.
        root: of the repository.
    """
    notebook = shown_notebook(source, root)
    name, origin = source.relative_to(root).as_posix(), root / "notebooks" / source.name  # links are the notebook's own
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = move_links("".join(cell["source"]), origin, page, modules, root)
    ran = any(cell.get("outputs") for cell in notebook["cells"])
    note = f"With the outputs of the run `{name}`." if ran else f"Text and code, not executed: `jupyter lab {name}`."
    notebook["cells"].insert(1, {"cell_type": "markdown", "id": "shown-run", "metadata": {}, "source": f"*{note}*"})
    return json.dumps(notebook, ensure_ascii=False)


def stage_pages(modules: Sequence[str] = (), root: Path = ROOT) -> list[Path]:
    """Write the pages that come from elsewhere to docs/, and return their files; what is unchanged is not touched."""
    written = []
    for page, source in page_sources(root).items():
        if source.suffix == ".ipynb":
            text = notebook_page(source, page, modules, root)
        else:
            text = move_links(source.read_text(encoding="utf-8"), source, page, modules, root)
        path = root / "docs" / page
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        written.append(path)
    return written


def add_thresholds(text: str, checks: Mapping[str, Check] = CHECKS) -> str:
    """Return the page of the sanity checks with threshold, reason, advice and source below each check's text.

    Args:
        text: Markdown that has a heading `### <check>` for each check.
        checks: by name.

    Returns:
        The text.

    Raises:
        ValueError: for a check without a heading, and a heading without a check.
    """
    head, *sections = re.split(r"(?m)^### ", text)
    names = [section.partition("\n")[0].strip() for section in sections]
    if sorted(names) != sorted(checks):
        odd = sorted(set(names) ^ set(checks)) or sorted(names)
        raise ValueError(f"expected one heading ### for each sanity check, got a difference in {', '.join(odd)}")
    out = [head]
    for name, section in zip(names, sections):
        check = checks[name]
        limit = "1 / number of classes" if math.isnan(check.threshold) else f"{check.threshold:g}"
        facts = [f"Red above {limit}: {check.reason}.", f"What to do: {check.advice}.", f"Source: {check.source}."]
        body, mark, rest = section.partition("\n## ")
        out.append(f"### {body.rstrip()}\n\n" + "\n".join(f"- {fact}" for fact in facts) + f"\n\n{mark.lstrip()}{rest}")
    return "".join(out)


def _list_table(lines: Sequence[str]) -> list[str]:
    """Return a Markdown table as a list-table of reStructuredText."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    out = ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for row in rows:
        if not all(re.fullmatch(r":?-+:?", cell) for cell in row):
            cells = [f"\\{cell}" if cell in ("-", "+", "*") else cell for cell in row]  # a dash, no list
            out += [f"{indent}   {'  -' if k else '* -'} {cell}" for k, cell in enumerate(cells)]
    return [*out, ""]


def rst_docstring(lines: Sequence[str]) -> list[str]:
    """Return a docstring of this project, whose tables are Markdown's, as reStructuredText."""
    out: list[str] = []
    for is_table, group in groupby(lines, lambda line: line.strip().startswith("|") and line.strip().endswith("|")):
        part = list(group)
        out += _list_table(part) if is_table else [KEYWORDS.sub(r"\*\*", line) for line in part]
    return out


def math_ml(formula: str, block: bool = False) -> str:
    """Return a formula of LaTeX as MathML, which browsers show without a script or a font from elsewhere.

    Args:
        formula: without dollar signs; a number by `\\tag` stands at the right.
        block: whether it has a line of its own.

    Returns:
        HTML.

    Raises:
        ValueError: for a command that is not known.
    """
    convert = importlib.import_module("latex2mathml.converter").convert  # of the extra `docs`
    number = re.search(r"\\tag\{([^}]*)\}", formula)
    plain = re.sub(r"\\tag\{[^}]*\}", "", formula).replace(r"\arg", r"\mathrm{arg}\,")
    markup = convert(plain.strip(), display="block" if block else "inline")
    if unknown := re.search(r"<m\w+>(\\[a-zA-Z]+)", markup):
        raise ValueError(f"expected LaTeX that MathML has, got {unknown.group(1)} in {formula!r}: write it otherwise")
    if not block:
        return markup
    return f'<div class="math-block">{markup}<span>{f"({number.group(1)})" if number else ""}</span></div>'
