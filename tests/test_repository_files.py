"""What a host of the repository and its visitors read: workflows, issue forms, citation, changelog, links."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import unquote

import jsonschema
import pytest
import yaml

from lib.pipeline.environment import TORCHATTACKS
from lib.utils.files import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE" / "config.yml"})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MARKERS = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
TARGETS = set(re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8")))
TEXT = {"type": "string", "minLength": 1}
ELEMENT = {  # of an issue form
    "type": "object",
    "required": ["type", "attributes"],
    "properties": {
        "type": {"enum": ["markdown", "input", "textarea", "dropdown", "checkboxes"]},
        "id": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"},
        "attributes": {"type": "object", "minProperties": 1},
        "validations": {"type": "object", "properties": {"required": {"type": "boolean"}}},
    },
    "additionalProperties": False,
    "if": {"properties": {"type": {"const": "markdown"}}},
    "then": {"properties": {"attributes": {"required": ["value"]}}, "not": {"required": ["id"]}},
    "else": {"required": ["id"], "properties": {"attributes": {"required": ["label"]}}},
}
FORM = {
    "type": "object",
    "required": ["name", "description", "body"],
    "properties": {"name": TEXT, "description": TEXT, "body": {"type": "array", "minItems": 1, "items": ELEMENT}},
}
AUTHOR = {
    "type": "object",
    "anyOf": [{"required": ["name"]}, {"required": ["family-names"]}, {"required": ["given-names"]}],
    "additionalProperties": TEXT,
}
CITATION = {  # the part of the schema of version 1.2.0 for the keys that are used; it knows no others
    "type": "object",
    "required": ["authors", "cff-version", "message", "title"],
    "properties": {
        "cff-version": {"const": "1.2.0"},
        "message": TEXT,
        "title": TEXT,
        "abstract": TEXT,
        "type": {"enum": ["dataset", "software"]},
        "version": TEXT,
        "date-released": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "license": TEXT,
        "repository-code": {"type": "string", "pattern": "^https?://"},
        "authors": {"type": "array", "minItems": 1, "uniqueItems": True, "items": AUTHOR},
        "keywords": {"type": "array", "minItems": 1, "uniqueItems": True, "items": TEXT},
    },
    "additionalProperties": False,
}


def read(path):
    """A YAML file; a date stays text, and so does the key `on`, which YAML 1.1 takes for a yes."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_run_what_exists_with_the_least_permissions(path):
    flow = read(path)
    assert flow["name"] and flow["on"] and flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        assert job["runs-on"] and int(job["timeout-minutes"]) < 360
        assert job.get("permissions") == ({"contents": "write"} if name == "release" else None)  # a release is written
        matrix = job.get("strategy", {}).get("matrix", {})
        assert set(matrix.get("marker", [])) <= MARKERS
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"
            assert set(re.findall(r"\bmake ([\w-]+)", step.get("run", ""))) <= TARGETS
            assert ("uses" in step) != ("run" in step)


def test_every_pull_request_runs_the_suite_and_every_night_what_takes_long():
    tests, nightly = (read(GITHUB / "workflows" / f"{name}.yml") for name in ("tests", "nightly"))
    assert {path.stem for path in WORKFLOWS} == {"tests", "nightly", "docs", "release"}
    assert {"push", "pull_request"} <= set(tests["on"]) and "schedule" in nightly["on"]
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert "make test" in [step.get("run") for step in tests["jobs"]["test"]["steps"]]
    assert set(nightly["jobs"]["long"]["strategy"]["matrix"]["marker"]) == MARKERS
    assert "-m ${{ matrix.marker }}" in nightly["jobs"]["long"]["steps"][-1]["run"]
    assert read(GITHUB / "workflows" / "release.yml")["on"] == {"push": {"tags": ["v*"]}}


def test_the_documentation_is_built_and_opened_on_every_pull_request():
    flow = read(GITHUB / "workflows" / "docs.yml")
    assert {"push", "pull_request"} <= set(flow["on"])
    steps = flow["jobs"]["docs"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs[0] == "make demo docs" and "-m slow tests/docs" in runs[1]
    assert [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")] == ["docs/_build/html"]


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(form, FORM)
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    ids, labels = ([get(field) for field in fields] for get in (lambda f: f["id"], lambda f: f["attributes"]["label"]))
    assert fields and len(set(ids)) == len(ids) and len(set(labels)) == len(labels)
    for field in fields:
        options = field["attributes"].get("options", [])
        assert (field["type"] in ("dropdown", "checkboxes")) == bool(options)
        if field["type"] == "dropdown":
            assert all(isinstance(option, str) for option in options) and len(set(options)) == len(options)
        if field["type"] == "checkboxes":
            assert all(option["label"] for option in options)


def test_the_form_of_a_defence_asks_for_what_an_entry_needs():
    assert {path.stem for path in FORMS} == {"bug", "reproduction", "evaluate-my-defence"}
    form = read(GITHUB / "ISSUE_TEMPLATE" / "evaluate-my-defence.yml")
    required = {e["id"] for e in form["body"] if e.get("validations", {}).get("required") == "true"}
    assert {"code", "weights", "norm", "eps", "random", "cost", "result"} <= required
    assert "python -m lib evaluate --json" in str(form)
    config = read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert config.keys() <= {"blank_issues_enabled", "contact_links"} and config["blank_issues_enabled"] == "true"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"name": "a", "description": "b"}, "'body' is a required property"),
        (
            {"name": "a", "description": "b", "body": [{"type": "text", "id": "c", "attributes": {"label": "d"}}]},
            "text",
        ),
        ({"name": "a", "description": "b", "body": [{"type": "input", "attributes": {"label": "d"}}]}, "'id'"),
    ],
)
def test_a_form_that_is_none_is_refused(form, message):
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(form, FORM)


def test_the_citation_is_valid_and_names_this_version():
    citation = read(ROOT / "CITATION.cff")
    jsonschema.validate(citation, CITATION)
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_changelog_names_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d{2}-\d{2})$", text)
    assert len(versions) == len(re.findall(r"(?m)^## ", text))
    numbers = [tuple(map(int, version.split("."))) for version, _ in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    current = PROJECT["project"]["version"]
    assert dict(versions)[current] == read(ROOT / "CITATION.cff")["date-released"]
    assert versions[0][0] == current or versions[0][1] == "unreleased"
    assert "unreleased" not in [when for _, when in versions[1:]]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.+)$", text)) <= kinds


def test_binder_and_the_pages_install_what_there_is():
    """The extras of pyproject.toml, torchattacks as it is locked, and torch from conda-forge, as pip then has it."""
    script = (ROOT / ".binder" / "postBuild").read_text(encoding="utf-8")
    assert os.access(ROOT / ".binder" / "postBuild", os.X_OK)
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    conda = [
        name.partition(">")[0].partition("=")[0] for name in read(ROOT / ".binder/environment.yml")["dependencies"]
    ]
    assert conda == ["python", "pip", "pytorch-cpu"]
    extras = PROJECT["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", page)) == extras.keys()
    for text in (script, page):
        assert set(re.findall(r'"\.\[(\w+)\]"', text)) == {"notebooks"} <= extras.keys()
        assert set(re.findall(r"torchattacks==([\d.]+)", text)) == {TORCHATTACKS}


def markdown_files():
    """Every Markdown file that is committed or could be."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def anchors(text):
    """The anchors of a page's headings, as its host makes them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = [re.sub(r"[`*]|\]\([^)]*\)", "", title) for title in re.findall(r"(?m)^#+ (.+)$", plain)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path):
    """The links of a page that lead to no file or heading of the repository; those to other places are not followed."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(<?([^)\s>]+)>?\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name) if name else path
        inside = target.resolve().is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


def test_links_between_pages_lead_somewhere():
    pages = markdown_files()
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} <= {p.name for p in pages}
    assert {page.relative_to(ROOT).as_posix(): links for page in pages if (links := broken_links(page))} == {}


def test_a_broken_link_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.md").write_text(
        "# One: two\n[b](b.md) [c](#one-two) [d](#one) [e](../e.md) `[f](f.md)` [g](https://h)"
    )
    assert broken_links(tmp_path / "a.md") == ["b.md", "#one", "../e.md"]
