"""Names of purifiers and results: taken apart and put together without loss."""

import pytest

from lib.utils.specs import PurifierSpec, ResultKey, StudentSpec, label_noise

SPECS = {
    "sde-100": PurifierSpec(StudentSpec("sde"), 100),
    "none-0": PurifierSpec(StudentSpec("none"), 0),
    "match-ode-1": PurifierSpec(StudentSpec("match-ode"), 1),
    "noskip-2": PurifierSpec(StudentSpec("cd", skip=False), 2),
    "noskip-match-sde@l2-4": PurifierSpec(StudentSpec("match-sde", skip=False, distance="l2"), 4),
    "adaptive@0.3-2": PurifierSpec(StudentSpec("adaptive", weight=0.3), 2),
    "adaptive@1e-05-1": PurifierSpec(StudentSpec("adaptive", weight=1e-5), 1),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_name_is_parsed_and_written_again(name):
    assert PurifierSpec.parse(name) == SPECS[name] and str(SPECS[name]) == name


def test_a_kind_has_no_weight_distance_or_steps():
    kinds = {name: PurifierSpec.parse(name).kind for name in ("noskip-clean@l2-1", "noskip-1", "adaptive@3-2")}
    assert list(kinds.values()) == ["noskip-clean", "noskip", "adaptive"]


@pytest.mark.parametrize("name", ["cd", "cd-two", "-2", "@0.3-2", "match-ode"])
def test_a_name_without_kind_or_steps_is_refused(name):
    with pytest.raises(ValueError, match="expected"):
        PurifierSpec.parse(name)


def test_keys_are_parsed_and_written_again():
    assert ResultKey.parse("adaptive@0.3-2/L2 0.5") == ("adaptive@0.3-2", "L2 0.5")
    assert str(ResultKey("cd", "0.25")) == "cd/0.25"


def test_a_variant_says_its_share_of_the_noise():
    shares = {"label": 1.0, "label-n25": 0.25, "label-n5": 0.05, "label-n0": 0.0}
    shares |= dict.fromkeys(["clean", "label-", "label-n", "label-n05", "label-n100", "label-1", "noskip-label"])
    assert {variant: label_noise(variant) for variant in shares} == shares


@pytest.mark.parametrize(
    "name",
    ["adaptive@nan-2", "adaptive@inf-2", "adaptive@-1-2", "cd-²", "adaptive.30360.part-2", "../cd-2", "/abs-1", ""]
    + ["cd-02", "adaptive@0.30-2", "cd-0", "cd-10001", "cd-99999999999", "cd@-2", "noskip--2", "a b-2", "cd@l2@l2-1"],
)
def test_fault_42_other_spellings_and_leftovers_are_no_names(name):
    with pytest.raises(ValueError, match="expected"):
        PurifierSpec.parse(name)
