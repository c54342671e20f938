"""A notebook's parameters: read from its cell tagged `parameters`, set from params.yaml and the command line.

papermill only logs an unknown name and passes text where a number is expected; here both are refused before any work.
What is valid: `lib.pipeline.schema`.
"""

import ast
import reprlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import nbformat

from lib.pipeline.profile import read_params
from lib.pipeline.schema import SECTIONS, check_names, notebook_types
from lib.utils.validation import check_value
from lib.utils.yaml_files import parse_yaml

TAG = "parameters"


class BadParameter(ValueError):
    """A parameter that cannot be read, or stands where none is expected."""


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Return a notebook; BadParameter, which names file, cause and remedy, for a file that is none."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat's own, and whatever it comes across in JSON of another form
        cause = " ".join(str(error).split())
        cause = cause if len(cause) <= 100 else f"{cause[:97]}..."
        raise BadParameter(
            f"expected a notebook, got {path} ({type(error).__name__}: {cause}): restore it, or save it in Jupyter"
        ) from None


def notebook_defaults(notebook: Path) -> dict[str, Any]:
    """Return the notebook's parameters and their default values, read from its one cell tagged `parameters`.

    Raises BadParameter unless there is exactly one such cell and each line of it assigns a literal.
    """
    cells = read_notebook(notebook).cells
    tagged = [c for c in cells if c.cell_type == "code" and TAG in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise BadParameter(f"{notebook}: expected one cell tagged `{TAG}`, got {len(tagged)}")
    defaults = {}
    for node in ast.parse(tagged[0].source).body:
        try:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    defaults[name] = ast.literal_eval(value)
                case _:
                    raise ValueError("no assignment of one name")
        except ValueError:
            raise BadParameter(
                f"{notebook}: expected literal assignments in the {TAG} cell, got `{ast.unparse(node)}`"
            ) from None
    return defaults


def parse_fraction(value: Any) -> Any:
    """Return text such as 8/255, also within a list, as a float, and any other value as it is."""
    if isinstance(value, list):
        return [parse_fraction(v) for v in value]
    try:
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else value
    except (ValueError, ArithmeticError):  # the check of types says what is expected
        return value


def parse_value(name: str, text: str, default: Any) -> Any:
    """Return command-line `text` as a value: itself where the default is text, else as in YAML, or a fraction."""
    return text if isinstance(default, str) else parse_fraction(parse_yaml(text, f"-p {reprlib.repr(name)[1:-1]}"))


def check_parameters(values: dict[str, Any], valid: dict[str, Any], notebook: Path) -> dict[str, Any]:
    """Return `values` in their types; BadSetting for an unknown name, another type or a value out of range."""
    check_names(values, valid, notebook.name, what="parameter")
    types = notebook_types(valid)
    return {
        name: check_value(f"parameter {name}", value, types[name], f"an example is {valid[name]!r}")
        for name, value in values.items()
    }


def gather_parameters(notebook: Path, sections: Sequence[str], pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the checked parameters: sections of params.yaml with the profile's name, overridden by the pairs."""
    valid, values = notebook_defaults(notebook), {}
    if sections:
        check_names(sections, SECTIONS, "params.yaml", what="section")
        params = read_params()
        for section in sections:
            if twice := sorted(values.keys() & params[section].keys()):
                raise BadParameter(f"expected each parameter in one section of {sections}, got {twice[0]} in two")
            values |= params[section]
        values["profile"] = params["profile"]
    names = [name for name, _ in pairs]
    check_names(names, valid, notebook.name, what="parameter")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadParameter(f"expected -p {twice[0]} once, got it {names.count(twice[0])} times: keep one")
    values |= {name: parse_value(name, text, valid[name]) for name, text in pairs}
    return check_parameters(values, valid, notebook)


def protect_pairs(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with a space before NAME and VALUE of each `-p NAME VALUE`.

    argparse would take a VALUE such as -1e-3 for an option; `unprotect` removes the space.
    """
    pair_starts = [i for i, argument in enumerate(arguments) if argument == "-p"]
    inside = {i + k for i in pair_starts for k in (1, 2)}
    return [f" {argument}" if i in inside else argument for i, argument in enumerate(arguments)]


def unprotect(argument: str) -> str:
    """Return the NAME or VALUE that `protect_pairs` put a space before."""
    return argument.removeprefix(" ")
