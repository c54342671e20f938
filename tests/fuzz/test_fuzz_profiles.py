"""Random profiles and `-p` pairs: parameters in the types of the table, equal to an independent merge, or a refusal."""

import copy
import math
import random
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib.pipeline import parameters, profile, schema
from lib.utils.code_hash import SOURCES
from lib.utils.files import ROOT
from tests.fuzz.common import check_refusal, examples

BASE_TEXT = (profile.PROFILES / "base.yaml").read_text(encoding="utf-8")
BASE = yaml.safe_load(BASE_TEXT)
PLACES = [(section, key) for section in schema.SECTIONS for key in BASE[section]]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 500), st.integers(), st.floats(), st.text(max_size=8), st.just(-0.0)
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
ODD = [
    "1e-05",
    "1e400",
    "010",
    "0o17",
    "1:30",
    "no",
    "yes",
    ".nan",
    "-.inf",
    "~",
    "1_0",
    "2024-01-01",
    "!!int 3",
    "&a 1",
]
ODD += [
    "*a",
    "[1, 1]",
    "[.5, .25]",
    "{a: 1}",
    "'x",
    '"\\x"',
    "@",
    "%",
    "- 1",
    "|",
    ">",
    "? 1",
    "<<",
    "[[1]]",
    "\t1",
    "8/255",
]
NAMES = st.sampled_from(["a", "b", "c", "d", "base", "digits", "../a", ""])
DEFAULTS = {name: parameters.notebook_defaults(ROOT / SOURCES[name]) for name in SOURCES if name != "data"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Profiles `base` and `digits`; each example writes its own over those named a to d."""
    path = tmp_path_factory.mktemp("profiles")
    (path / "base.yaml").write_text(BASE_TEXT, encoding="utf-8")
    (path / "digits.yaml").write_text("profile: digits\n")
    return path


def in_range(value, default) -> bool:
    """Whether a value has the type of a default by rules of this file: not those of the library."""
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    if isinstance(default, float):
        return isinstance(value, float) and math.isfinite(value) and value >= 0
    if isinstance(default, list):
        return isinstance(value, list) and all(type(v) is type(default[0]) for v in value if default)
    if isinstance(default, int):
        return isinstance(value, int) and 0 <= value <= 2**32
    return isinstance(value, str) and "\n" not in value


def check_composed(composed: dict, name: str) -> None:
    """Fails unless a composed profile has all keys of the base, in its order, with values of its types."""
    assert list(composed) == list(BASE) and composed["profile"] == name
    for section, key in PLACES:
        assert list(composed[section]) == list(BASE[section])
        assert in_range(composed[section][key], BASE[section][key]), (section, key, composed[section][key])
    assert all(len(set(seeds)) == len(seeds) for seeds in composed["seeds"].values())


def refused(call, *arguments):
    """Returns None where the call refuses clearly, else its result."""
    try:
        return call(*arguments)
    except ValueError as error:
        check_refusal(error)
        return None


@examples(150)
@given(st.dictionaries(st.sampled_from(PLACES), VALUES, min_size=1, max_size=2))
def test_values_of_any_type_are_right_or_refused(folder, changes):
    document: dict = {}
    for (section, key), value in changes.items():
        document.setdefault(section, {})[key] = value
    (folder / "a.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    if (composed := refused(profile.compose_profile, "a", folder)) is not None:
        check_composed(composed, "a")
        expected = copy.deepcopy(BASE) | {"profile": "a"}
        for (section, key), value in changes.items():
            expected[section][key] = value
        assert composed == expected
        text = profile.render_profile("a", folder)
        assert yaml.safe_load(text) == composed


def neighbour(value, rng: random.Random):
    """Returns a valid value beside a default: twice a number above 2, fewer entries of a list, else the default."""
    if isinstance(value, list) and len(value) > 2:
        return rng.sample(value, rng.randint(2, len(value)))
    return 1.5 * value if isinstance(value, float) and value < 0.5 else value


@examples(60)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_valid_changes_along_a_chain_are_those_of_an_independent_merge(folder, seed, length):
    rng, expected, like = random.Random(seed), copy.deepcopy(BASE), "base"
    for name in "abcd"[:length]:
        document: dict = {"like": like, "profile": name}
        for section, key in rng.sample(PLACES, 6):
            if key != "levels":
                document.setdefault(section, {})[key] = expected[section][key] = neighbour(BASE[section][key], rng)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        like = expected["profile"] = name
    assert profile.compose_profile(like, folder) == expected


@examples(80)
@given(st.lists(NAMES, min_size=4, max_size=4), NAMES)
def test_chains_end_or_are_refused(folder, likes, name):
    for own, like in zip("abcd", likes, strict=True):
        (folder / f"{own}.yaml").write_text(yaml.safe_dump({"like": like, "threads": 1}), encoding="utf-8")
    if (composed := refused(profile.compose_profile, name, folder)) is not None:
        check_composed(composed, name)


@examples(150)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(alphabet=string.printable, max_size=60).map(str.encode),
        st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.tuples(st.sampled_from(PLACES), st.sampled_from(ODD)).map(
            lambda pair: f"{pair[0][0]}:\n  {pair[0][1]}: {pair[1]}\n".encode()
        ),
    )
)
def test_any_bytes_are_a_profile_or_are_refused(folder, content):
    (folder / "a.yaml").write_bytes(content)
    if (composed := refused(profile.compose_profile, "a", folder)) is not None:
        check_composed(composed, "a")


@examples(200)
@given(
    st.sampled_from(sorted(DEFAULTS)),
    st.lists(
        st.tuples(st.integers(0, 40), st.one_of(st.sampled_from(ODD), VALUES.map(str), st.text(max_size=12))),
        min_size=1,
        max_size=2,
    ),
)
def test_any_pairs_are_parameters_or_are_refused(monkeypatch, name, choices):
    monkeypatch.setattr(parameters, "notebook_defaults", lambda path: DEFAULTS[path.stem.split("_")[0]])
    names = list(DEFAULTS[name])
    pairs = [(names[i % len(names)], text) for i, text in choices]
    path = ROOT / f"{name}_.ipynb"
    if (values := refused(parameters.gather_parameters, path, [], pairs)) is not None:
        assert set(values) == {key for key, _ in pairs} and len(pairs) == len(values)
        for key, text in pairs:
            default = DEFAULTS[name][key]
            assert in_range(values[key], default) or key in ("methods", "weights")
            assert not isinstance(default, str) or values[key] == text
