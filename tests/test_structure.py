"""The package keeps its shape: layers, sizes, one home for each name, the field's words, docstrings of the API."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

from lib.utils.files import ROOT
from tests.faults import BEGIN, END, INPUTS, README, fault_tests, faults_table

MODULES = sorted((ROOT / "lib").rglob("*.py"))
SHARED = {"main", "FIGURES", "load"}  # protocols: every command has a main, every module of figures its FIGURES; what
# comes with the repository is loaded as a user looks for it, lib.models.load and lib.purify.load
PUBLIC = ("attacks", "evaluation", "purify.py", "training.py", "distillation")
# Identifiers of the old private vocabulary, and phrases of it in prose and messages
OLD_NAMES = set(
    re.findall(
        r"\w+",
        "asked told found made kept judge judged judges Row Nothing lent beaten Restore Ways ways jump jumps "
        "Warm Tracked t_of noised ladder halving yardstick gap workshop described undisturbed streams beside ascent "
        "descend put_to_test put_all_to_test face",
    )
)
OLD_PHRASES = re.compile(
    r"\b(?:is|are) due\b|\bway back\b|\bways back\b|\bclothes\b|has 0 in it|fails by a hair|right in all of|\byardstick"
    r"|\bladder\b|\bjudge\b|\bworkshop\b"
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top_level_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def cells(path: Path, kind: str) -> str:
    every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in every if c["cell_type"] == kind) + "\n"


def test_layers_and_contracts_hold():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_name_is_defined_in_two_modules():
    homes = defaultdict(list)
    for path in MODULES:
        for name in top_level_names(ast.parse(path.read_text(encoding="utf-8"))) - SHARED:
            homes[name].append(name_of(path))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_modules_are_short():
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert {name: n for name, n in lengths.items() if n > 330} == {}


def test_functions_have_at_most_ten_parameters():
    """But public attacks and `train`."""
    long = {}
    for path in MODULES:
        attacks = name_of(path).startswith("lib/attacks/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "train" and not (attacks and node.name[0] != "_"):
                a = node.args
                n = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
                if n > 10:
                    long[f"{name_of(path)}:{node.name}"] = n
    assert long == {}


def test_packages_import_nothing():
    for path in MODULES:
        if path.name == "__init__.py" and "figures" not in path.parts:
            assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, name_of(path)


def old_words(source: str) -> set[str]:
    """Returns the identifiers of the old vocabulary in Python source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME} & OLD_NAMES


def test_old_words_are_recognised():
    assert old_words("def f(found):\n    return found.made\n") == {"found", "made"}
    assert OLD_PHRASES.search("at least 1 is due") and not OLD_PHRASES.search("due to rounding")


@pytest.mark.parametrize("folder", ["lib", "tests", "notebooks", "figures"])
def test_none_of_the_old_words_is_left(folder):
    left = {}
    for path in sorted((ROOT / folder).rglob("*")):
        if (
            path.suffix not in (".py", ".ipynb", ".yaml", ".svg")
            or path == Path(__file__)
            or ".ipynb_checkpoints" in path.parts
        ):
            continue
        text = path.read_text(encoding="utf-8")
        code = text if path.suffix == ".py" else cells(path, "code") if path.suffix == ".ipynb" else ""
        prose = cells(path, "markdown") + code if path.suffix == ".ipynb" else text
        if path.suffix == ".svg":  # names of attack budgets in records; readers get words
            code = " ".join(re.findall(r">([^<>]*\b(?:sweep|many|exact|extra)\b[^<>]*)<", text))
            assert code == "", name_of(path)
        words = old_words(code) | {match.group() for match in OLD_PHRASES.finditer(prose)}
        if words:
            left[name_of(path)] = sorted(words)
    assert left == {}


def public_functions() -> list[tuple[str, ast.FunctionDef]]:
    out = []
    for path in MODULES:
        if path.relative_to(ROOT / "lib").parts[0] in PUBLIC:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
                    out.append((f"{name_of(path)}:{node.name}", node))
    return out


def test_public_functions_say_what_they_take_and_give():
    """Those with three parameters or more in full; a helper with fewer may do with one imperative line."""
    lacking = {}
    for name, node in public_functions():
        text = ast.get_docstring(node) or ""
        wanted = ["Args:", "Returns:"] if len(node.args.args + node.args.kwonlyargs) >= 3 else []
        wanted = wanted[:1] if isinstance(node.returns, ast.Constant) and node.returns.value is None else wanted
        raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
        missing = [part for part in (*wanted, *(["Raises:"] if raises else [])) if part not in text]
        if not text or text.startswith("Returns ") or missing:
            lacking[name] = missing or text.splitlines()[:1]
    assert lacking == {}


def test_six_examples_run_in_the_suite():
    examples = [name_of(p) for p in MODULES if ">>> " in p.read_text(encoding="utf-8")]
    wanted = {"attacks", "robust_accuracy", "sanity_checks", "purify", "training", "distillation"}
    assert {part for part in wanted if any(part in name for name in examples)} == wanted


def test_tracked_files_are_small():
    listed = subprocess.run(("git", "ls-files", "-z"), cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.exists()) <= 20e6
    runs = [(file.parent, file.name.partition("-s")[0]) for file in files if file.parent.name == "runs"]
    assert len(runs) == len(set(runs)), "executed notebooks of one seed of each experiment"


def test_every_fault_has_a_test_and_the_table_names_it():
    assert sorted(fault_tests()) == sorted(INPUTS)
    table = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert table.strip() == faults_table(), "run `python -m tests.faults`"


NOT_TEXT = ("gzip", "Image", "tarfile", "os")  # their `open`
TEXT_FILES = {"read_text": 0, "write_text": 1, "open": 2}  # method → place of its encoding; of the function open: 3


def calls_without_encoding(tree):
    """Yield the line of each call that reads or writes text in whatever encoding the locale has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        given = {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = name == "open" and any("b" in str(mode) for mode in [*modes[-1:], given.get("mode", "")])
        is_function = isinstance(node.func, ast.Name)
        known = name == "open" if is_function else name in TEXT_FILES and owner not in NOT_TEXT
        reads = known and not binary and len(node.args) <= TEXT_FILES[name] + is_function
        if (reads or given.get("text") is True) and "encoding" not in given:
            yield node.lineno


def test_fault_23_all_text_is_read_and_written_as_utf_8():
    """Not in the encoding of the locale, which may be ASCII."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "lib").rglob("*.py"))
        for line in calls_without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
    bad = ["open(p)", "open(p, 'w')", "p.open()", "p.read_text()", "p.write_text(t)", "run(c, text=True)"]
    assert [len(list(calls_without_encoding(ast.parse(code)))) for code in bad] == [1] * 6
    good = ["open(p, 'rb')", "p.open(mode='rb')", "p.open('rb')", "p.read_text('utf-8')", "open(p, encoding='utf-8')"]
    assert not any(list(calls_without_encoding(ast.parse(code))) for code in good)
