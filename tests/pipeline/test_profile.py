"""Profiles: strict composition, YAML 1.2, and params.yaml in step with the default one."""

import time

import pytest
import yaml

from lib.pipeline import profile
from lib.utils.files import ROOT
from lib.utils.yaml_files import first_seed

FAULTY = {  # text of profiles/a.yaml → what the refusal says
    "kd: {epochs: 3}": "unknown key 'epochs' in section kd of profiles/a.yaml: did you mean",
    "k: {T: 3}": "unknown key 'k' in profiles/a.yaml",
    "kd: {members: 3.5}": r"expected kd.members in profiles/a.yaml to be an integer >= 1.*, got 3.5",
    "kd: {members: true}": "got True",
    "kd: {members: 0}": "got 0",
    "kd: {members: 1000000000000}": "<= 1000000000",
    "kd: {T: 1:30}": "got '1:30'",
    "kd: {T: .nan}": "finite number > 0, got nan",
    "kd: {T: 1e400}": "finite number > 0, got inf",
    "kd: {student_lr: -0.0}": "got -0.0",
    "kd: {student_lr: '1e-3'}": "got '1e-3'",
    "kd: 3": "expected a section",
    "kd:": "expected a section",
    "kd: {alphas: [x]}": "each a finite number >= 0 and <= 1",
    "kd: {alphas: []}": "a list of 1 or more different entries",
    "kd: {alphas: 0.5}": "got 0.5",
    "kd: {clock: 1}": "True or False",
    "kd: {clock: yes}": "True or False, got 'yes'",
    "kd: {label_counts: [9]}": "an integer >= 10, or 0",
    "kd: {jobs: 2, jobs: 1}": "line 1, got: found duplicate key",
    "kd:\n\tjobs: 2": "line 2, got: .* indent by spaces",
    "seeds: {kd_seeds: [0, 0]}": "different entries",
    "seeds: {kd_seeds: [-1]}": "an integer >= 0",
    "data: {dataset: cifar11}": "one of 'digits', 'mnist', 'fashion-mnist', 'cifar10', got 'cifar11'",
    "data: {train_images: 3}": "an integer >= 10, or 0",
    "threads: -1": "got -1",
    "rd: {precision: fp8}": "one of 'no', 'fp16', 'bf16'",
    "rd: {teacher: resnet101}": "one of 'cnn'",
    "dp: {teacher: sde}": "sde-<steps>",
    "dp: {variants: [clean, adaptve]}": "each",
    "profile: ../x": "expected profile in profiles/a.yaml to be a name of",
    "profile: b": "expected profile: a in profiles/a.yaml, got 'b'",
    "like: ../a": "expected like in profiles/a.yaml to be a name of",
    "like: digit": "unknown profile 'digit' in profiles/: did you mean digits",
    "only text": "expected `key: value` lines in .*, got a str",
    "- 1": "got a list",
    "": "got nothing",
    "# a comment": "got nothing",
    "a: 1\n---\nb: 2": "a second document in line 2",
    "kd: &x {T: 1}": "an anchor",
    "kd: {<<: {T: 1}}": "merge key",
    "kd: {T: !!float 1}": "a tag in line 1",
    "%YAML 1.1\n---\nkd: {members: 010}": "a directive in line 1",
    "kd: {T: " + "[" * 3000: "more than 10 levels",
    "kd: {T: " + "1" * 5000 + "}": "integer string",
    "kd: {T: 'x": "expected YAML in .*a.yaml, line 1",
    "kd: {T: 2024-13-01}": "month",
    "\x01": "special characters",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.yaml").write_bytes((profile.PROFILES / "base.yaml").read_bytes())

    def write(text: str, name: str = "a"):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path

    write("profile: digits\n", "digits")
    return write


def test_differences_are_laid_over_the_base(folder):
    base = profile.compose_profile("digits")
    composed = profile.compose_profile("a", folder("threads: 2\nkd:\n  members: 9\n  T: 3\n  alphas: [1, 0.25]\n"))
    changed = base["kd"] | {"members": 9, "T": 3.0, "alphas": [1.0, 0.25]}
    assert composed == base | {"profile": "a", "threads": 2, "kd": changed}
    assert list(composed["kd"]) == list(base["kd"])
    assert all(type(value) is float for value in (composed["kd"]["T"], composed["kd"]["alphas"][0]))


@pytest.mark.parametrize("text", FAULTY, ids=lambda text: ascii(text[:30]))
def test_fault_40_45_profiles_that_mean_nothing_are_refused_in_one_line(folder, text):
    with pytest.raises(ValueError, match=FAULTY[text]) as caught:
        profile.compose_profile("a", folder(text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_fault_45_numbers_are_those_of_yaml_1_2(folder):
    composed = profile.compose_profile(
        "a", folder("kd: {members: 010, T: 1e1, student_lr: 1e-05}\nrd: {precision: no}")
    )
    assert composed["kd"]["members"] == 10 and composed["kd"]["T"] == 10.0 and composed["kd"]["student_lr"] == 1e-5
    assert composed["rd"]["precision"] == "no"


def test_fault_45_a_circle_of_like_is_named_at_once(folder):
    begin = time.monotonic()
    for name, like in (("a", "b"), ("b", "c"), ("c", "b"), ("d", "d")):
        path = folder(f"like: {like}\n", name)
    for name, circle in (("a", "a -> b -> c -> b"), ("d", "d -> d")):
        with pytest.raises(ValueError, match=f"expected an end of `like`, got the circle {circle}"):
            profile.compose_profile(name, path)
    assert time.monotonic() - begin < 2


def test_fault_45_what_is_no_readable_file_of_its_own_is_named(folder, tmp_path):
    folder("threads: 2\n")
    (tmp_path / "b.yaml").mkdir()
    (tmp_path / "c.yaml").symlink_to(tmp_path / "a.yaml")
    (tmp_path / "d.yaml").write_bytes("# ε\n".encode("utf-16"))
    (tmp_path / "e.yaml").write_bytes(b"threads: 2\n# \xff\n")
    messages = {"b": "b.yaml, which is no file", "c": "got the link", "d": "UTF-8", "e": "bytes in line 2: save it as"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            profile.compose_profile(name, tmp_path)
    assert profile.compose_profile("a", tmp_path)["threads"] == 2


@pytest.mark.parametrize("name", ["", "../../trav", "a/b", "/abs", "-a", ".a", "a" * 65, "base", "a.b", "a\n"])
def test_fault_40_45_names_of_profiles_are_plain(folder, name):
    with pytest.raises(ValueError, match=r"a name of up to 64|unknown profile 'base'"):
        profile.compose_profile(name, folder("threads: 1\n"))


def test_fault_45_a_base_without_all_parameters_is_refused(folder, tmp_path):
    base = yaml.safe_load((tmp_path / "base.yaml").read_text(encoding="utf-8"))
    del base["kd"]["T"]
    folder(yaml.safe_dump(base), "base")
    with pytest.raises(ValueError, match=r"expected all parameters in section kd of profiles/base.yaml, got none for"):
        profile.compose_profile("digits", tmp_path)


def test_a_profile_may_be_like_another_one(folder, tmp_path):
    folder("like: a\nprofile: b\nkd: {alphas: [0.1]}\n", "b")
    composed = profile.compose_profile("b", folder("threads: 2\nkd: {members: 9, alphas: [1.0]}\n"))
    expected = profile.compose_profile("digits") | {"profile": "b", "threads": 2}
    assert composed == expected | {"kd": expected["kd"] | {"members": 9, "alphas": [0.1]}}
    assert profile.compose_profile("c", folder("like: base\n", "c"))["profile"] == "c"
    folder("like: other\n", "b")
    with pytest.raises(ValueError, match="unknown profile 'other' in profiles/: expected one of a, b, c, digits"):
        profile.compose_profile("b", tmp_path)


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'digit' in .* did you mean digits\? expected one of cifar10, digits, fashion-"
    ):
        profile.compose_profile("digit")


@pytest.mark.parametrize("name", profile.available_profiles())
def test_every_profile_composes_under_its_own_name_and_survives_yaml(name, tmp_path):
    rendered, composed = profile.render_profile(name), profile.compose_profile(name)
    (tmp_path / "params.yaml").write_text(rendered, encoding="utf-8")
    assert yaml.safe_load(rendered) == profile.read_params(tmp_path / "params.yaml") == composed
    assert composed["profile"] == name
    own = yaml.safe_load((profile.PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert own["profile"] == name


def test_params_yaml_is_the_default_profile():
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == profile.render_profile("digits")


def test_fault_22_numbers_that_dvc_writes_are_numbers(tmp_path):
    """`dvc exp run -S kd.student_lr=1e-5` writes YAML 1.2, in which 1e-05 is a number and `no` is text."""
    text = profile.render_profile("digits").replace("student_lr: 0.005", "student_lr: 1e-05").replace("'no'", "no")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    params = profile.read_params(tmp_path / "params.yaml")
    assert params["kd"]["student_lr"] == 1e-5 and params["rd"]["precision"] == "no"


@pytest.mark.parametrize("name", ["1e5", "0o17", "010", "null", "no", "1_0", "true", "12"])
def test_fault_22_readers_of_both_versions_take_params_yaml_for_the_same(folder, name, tmp_path):
    text = profile.render_profile(name, folder("kd: {student_lr: 1e-05}\n", name))
    folder(text, "params")
    params = profile.read_params(tmp_path / "params.yaml")
    assert yaml.safe_load(text) == params and params["profile"] == name and params["kd"]["student_lr"] == 1e-5


def test_fault_45_a_changed_params_yaml_is_checked(tmp_path):
    for old, new in (
        ("members: 3", "members: 0"),
        ("members: 3", "member: 3"),
        ("  T: 4.0\n", ""),
        ("kd:", "kd: 3\nx:"),
    ):
        (tmp_path / "params.yaml").write_text(profile.render_profile("digits").replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match=r"params.yaml"):
            profile.read_params(tmp_path / "params.yaml")
    with pytest.raises(ValueError, match=r"nothing.yaml, which is missing"):
        profile.read_params(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(("seeds", "first"), [("{diff_seeds: [20, 21], dp_seeds: [3]}", 20), ("{diff_seeds: []}", 0)])
def test_the_first_seed_of_an_experiment_is_that_of_the_parameters(tmp_path, seeds, first):
    (tmp_path / "params.yaml").write_text(f"seeds: {seeds}\n", encoding="utf-8")
    assert first_seed("diff", tmp_path / "params.yaml") == first
