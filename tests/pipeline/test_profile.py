"""Profiles: strict composition, and params.yaml in step with the default one."""

import pytest
import yaml

from lib.pipeline import profile
from lib.utils.files import ROOT


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.yaml").write_text("profile: a\nlr: 0.1\nkd: {epochs: 3, alphas: [0.5], name: x, flag: true}\n")

    def write(text: str):
        (tmp_path / "a.yaml").write_text(text)
        return tmp_path

    return write


def test_differences_are_laid_over_the_base(folder):
    composed = profile.compose_profile("a", folder("lr: 1\nkd:\n  epochs: 9\n  alphas: [1, 0.25]\n"))
    assert composed == {"profile": "a", "lr": 1.0, "kd": {"epochs": 9, "alphas": [1, 0.25], "name": "x", "flag": True}}
    assert isinstance(composed["lr"], float)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("kd: {eppochs: 3}", KeyError, "unknown key 'kd.eppochs': expected one of epochs, alphas"),
        ("kd: {epochs: 3.5}", TypeError, "kd.epochs: expected int, got 3.5"),
        ("kd: {epochs: true}", TypeError, "kd.epochs: expected int, got True"),
        ("lr: 1e-3", TypeError, "write 1.0e-3"),
        ("kd: 3", TypeError, "kd: expected a section, got 3"),
        ("kd: {alphas: [x]}", TypeError, "kd.alphas: expected list of float"),
        ("kd: {flag: 1}", TypeError, "kd.flag: expected bool"),
    ],
)
def test_unknown_keys_and_other_types_are_refused(folder, text, error, message):
    with pytest.raises(error, match=message):
        profile.compose_profile("a", folder(text))


def test_a_profile_may_be_like_another_one(folder, tmp_path):
    (tmp_path / "b.yaml").write_text("like: a\nprofile: b\nkd: {alphas: [0.1]}\n")
    composed = profile.compose_profile("b", folder("lr: 1\nkd: {epochs: 9, alphas: [1.0]}\n"))
    assert composed == {"profile": "b", "lr": 1.0, "kd": {"epochs": 9, "alphas": [0.1], "name": "x", "flag": True}}
    (tmp_path / "b.yaml").write_text("like: c\n")
    with pytest.raises(ValueError, match="unknown profile 'c': expected one of a, b"):
        profile.compose_profile("b", tmp_path)


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'digit': expected one of cifar10, digits, fashion-mnist, fashion-mnist-gpu"):
        profile.compose_profile("digit")


@pytest.mark.parametrize("name", profile.available_profiles())
def test_every_profile_composes_under_its_own_name_and_survives_yaml(name):
    rendered = profile.render_profile(name)
    assert (
        yaml.safe_load(rendered) == profile.compose_profile(name) and profile.compose_profile(name)["profile"] == name
    )
    own = yaml.safe_load((profile.PROFILES / f"{name}.yaml").read_text())
    assert own["profile"] == name


def test_params_yaml_is_the_default_profile():
    assert (ROOT / "params.yaml").read_text() == profile.render_profile("digits")
