"""A notebook's parameters: read from its cell tagged `parameters`, set from params.yaml and the command line.

papermill only logs an unknown name and passes text where a number is expected; here both are refused before any work,
with the list of what is valid.
"""

import ast
from fractions import Fraction
from pathlib import Path
from typing import Any

import nbformat
import yaml

from lib.pipeline.profile import fits_type, type_name
from lib.utils.files import ROOT

TAG = "parameters"


class BadParameter(ValueError):
    """A parameter that the notebook does not have, or a value of another type than its default."""


def notebook_defaults(notebook: Path) -> dict[str, Any]:
    """Return the notebook's parameters and their default values, read from its one cell tagged `parameters`.

    Raises BadParameter unless there is exactly one such cell and each line of it assigns a literal.
    """
    cells = nbformat.read(notebook, as_version=4).cells
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


def parse_value(name: str, text: str, default: Any) -> Any:
    """Return command-line `text` as a value of the type of `default`; a fraction such as 8/255 is a float."""
    try:
        if isinstance(default, str):
            return text
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, float):
            return float(Fraction(text)) if "/" in text else float(text)
        return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, ZeroDivisionError):
        raise BadParameter(f"{name}: expected {type_name(default)}, such as {default!r}, got {text!r}") from None


def check_parameters(values: dict[str, Any], valid: dict[str, Any], notebook: Path) -> dict[str, Any]:
    """Return `values` in the types of the defaults; BadParameter for an unknown name or a value of another type."""
    for name, value in values.items():
        if name not in valid:
            listing = ", ".join(f"{k} ({type_name(v)}, {v!r})" for k, v in valid.items())
            raise BadParameter(f"{notebook.name} has no parameter {name!r}. Valid ones: {listing}")
        if not fits_type(value, valid[name]):
            kind, example = type_name(valid[name]), valid[name]
            raise BadParameter(f"{name}: expected {kind}, such as {example!r}, got {value!r} ({type(value).__name__})")
    return {k: float(v) if isinstance(valid[k], float) else v for k, v in values.items()}


def gather_parameters(notebook: Path, sections: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the checked parameters: sections of params.yaml with the profile's name, overridden by the pairs."""
    valid, values = notebook_defaults(notebook), {}
    if sections:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        for section in sections:
            if not isinstance(params.get(section), dict):
                names = ", ".join(k for k, v in params.items() if isinstance(v, dict))
                raise BadParameter(f"params.yaml: expected one of the sections {names}, got {section!r}")
            values |= params[section]
        values["profile"] = params["profile"]
    for name, text in pairs:
        values[name] = parse_value(name, text, valid[name]) if name in valid else text
    return check_parameters(values, valid, notebook)
