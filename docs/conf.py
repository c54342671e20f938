"""Sphinx's settings; `make docs` builds the site. What pages take from elsewhere: `lib.pipeline.documentation`."""

import os
import re
import shutil
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

os.environ.setdefault("TQDM_DISABLE", "1")
DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

from lib.pipeline import documentation  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = re.findall(r"(?m)^   (lib\.[\w.]+)$", (DOCS / "api.rst").read_text(encoding="utf-8"))
DEMO = DOCS / "demo"

project, version, release = "Distilled Defence", PROJECT["version"], PROJECT["version"]
author = copyright = "The Distilled Defence authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "demo", "Thumbs.db", ".DS_Store"]
templates_path, html_static_path, html_css_files = ["_templates"], ["_static"], ["site.css"]

html_theme, html_title, html_favicon = "furo", "Distilled Defence", "_static/icon.svg"
html_copy_source = html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # no script from elsewhere
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autosummary_generate = True
napoleon_use_rtype = napoleon_use_admonition_for_examples = False
napoleon_use_ivar = True
add_module_names = False
default_role = "py:obj"
nitpick_ignore_regex = [("py:.*", ".*")]  # torch's classes, and names in backticks that are no object of a page

bibtex_bibfiles, bibtex_default_style = ["references.bib"], "plain"


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Move the links of a page of docs/ to pages of the site, and complete the sanity checks."""
    path = Path(app.env.doc2path(page))
    if path.suffix == ".md" and documentation.FOLDER not in path.relative_to(DOCS).parts:
        source[0] = documentation.move_links(source[0], path, path.relative_to(DOCS).as_posix(), MODULES)
    if page == "sanity_checks":
        source[0] = documentation.add_thresholds(source[0])


def read_docstring(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Turn a docstring's tables into those of reStructuredText."""
    lines[:] = documentation.rst_docstring(lines)


def show_math(translator, node: nodes.math) -> None:
    """Write a formula of a line."""
    translator.body.append(documentation.math_ml(node.astext()))
    raise nodes.SkipNode


def show_math_block(translator, node: nodes.math_block) -> None:
    """Write a formula that has a line of its own."""
    translator.body.append(documentation.math_ml(node.astext(), block=True))
    raise nodes.SkipNode


def copy_demo(app: Sphinx, exception: Exception | None) -> None:
    """Copy the page that `make demo` completed into the site."""
    if exception is None and app.tags.has("demo"):
        ignored = shutil.ignore_patterns("node_modules", "package*.json", ".npmrc", "screenshot.png")
        shutil.copytree(DEMO, Path(app.outdir) / "demo", dirs_exist_ok=True, ignore=ignored)


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    pages = {*documentation.stage_pages(MODULES), *(DOCS / "api" / f"{module}.rst" for module in MODULES)}
    for path in (*(DOCS / documentation.FOLDER).glob("*.*"), *(DOCS / "api").glob("*.rst")):
        if path not in pages:  # of an earlier state of the repository
            path.unlink()
    if (DEMO / "build").is_dir():
        app.tags.add("demo")
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("build-finished", copy_demo)
    app.add_html_math_renderer("mathml", (show_math, None), (show_math_block, None))


html_math_renderer = "mathml"
