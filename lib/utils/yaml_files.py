"""YAML files: read as YAML 1.2, where 1e-05 is a number and 010 is ten, and written so that readers of 1.1 agree.

Of YAML only what settings need: one document of mappings, lists and scalars, without anchors, tags and directives.
Needs no torch.
"""

import io
import re
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from lib.utils.files import ROOT
from lib.utils.validation import Name, NonNegativeInt, check_value

PARAMS = ROOT / "params.yaml"
DEPTH = 10  # of mappings and lists in each other; more are not settings


def _reader() -> YAML:
    """Return a reader of YAML 1.2 that refuses duplicate keys and makes plain Python values alone."""
    return YAML(typ="safe", pure=True)


def _find_excess(text: str) -> str:
    """Return the first thing in YAML text that no settings need and its line, an empty string where there is none."""
    if directive := re.search(r"^%", text, re.MULTILINE):
        line = text[: directive.start()].count("\n") + 1
        return f"a directive in line {line}"
    depth = documents = 0
    for event in _reader().parse(io.StringIO(text)):
        line = f"in line {event.start_mark.line + 1}"
        documents += isinstance(event, DocumentStartEvent)
        depth += isinstance(event, MappingStartEvent | SequenceStartEvent)
        depth -= isinstance(event, MappingEndEvent | SequenceEndEvent)
        merge_key = isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) or merge_key:
            return f"an anchor, alias or merge key {line}"
        if getattr(event, "tag", None):
            return f"a tag {line}"
        if documents > 1:
            return f"a second document {line}"
        if depth > DEPTH:
            return f"more than {DEPTH} levels {line}"
    return ""


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of YAML 1.2 text; ValueError, one line with `source` and the line, for anything else."""
    try:
        if excess := _find_excess(text):
            raise ValueError(f"expected plain settings in {source}, got {excess}: write the values out")
        return _reader().load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    except (TypeError, RecursionError, LookupError, AttributeError, NotImplementedError) as error:
        mark, problem = None, f"{type(error).__name__} of the reader"
    except ValueError as error:  # ours, and those of numbers and dates
        if source in str(error):
            raise
        mark, problem = None, str(error)
    place = f"{source}, line {mark.line + 1}" if mark else source
    hint = "indent by spaces, not by tabs" if "\\t" in problem else "correct it there"
    raise ValueError(f"expected YAML in {place}, got: {' '.join(problem.split())[:200]}: {hint}") from None


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file; ValueError, which names the file, for what is no YAML file of settings."""
    if not path.is_file():
        raise ValueError(f"expected a YAML file, got {path}, which is {'no file' if path.exists() else 'missing'}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise ValueError(f"expected UTF-8 in {path}, got other bytes in line {line}: save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"expected a YAML file, got {path}: {error.strerror}") from None
    return parse_yaml(text, str(path))


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML file; ValueError, which names the file, for anything else."""
    value = read_yaml(path)
    if not isinstance(value, dict):
        what = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"expected `key: value` lines in {path}, got {what}")
    return value


class _Dumper(yaml.SafeDumper):
    """The dumper of YAML 1.1, which quotes also text that only YAML 1.2 would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Return the node of text, with quotes where plain text would be read as another value."""
    try:
        plain = parse_yaml(text, "text") == text
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Return YAML that readers of versions 1.1 and 1.2 take for the same value, in the order of its keys."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110)


def active_profile(path: Path = PARAMS) -> str:
    """Return the name of the profile that params.yaml holds."""
    return check_value(f"the profile in {path.name}", read_mapping(path).get("profile"), Name)


def first_seed(experiment: str, path: Path = PARAMS) -> int:
    """Return the first seed of an experiment in params.yaml, 0 where it has none."""
    seeds = (read_mapping(path).get("seeds") or {}).get(f"{experiment}_seeds") or [0]
    return check_value(f"the first of {experiment}_seeds in {path.name}", seeds[0], NonNegativeInt)
