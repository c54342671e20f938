"""Settings are checked by the annotations of the signature that they belong to."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch

from lib.utils.validation import (
    BadSetting,
    Integer,
    NonNegative,
    Number,
    Positive,
    PositiveInt,
    Share,
    check_fields,
    check_settings,
    check_value,
    describe_type,
)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_all_libraries_pass(value):
    assert check_value("steps", value, PositiveInt) == 3 and type(check_value("steps", value, PositiveInt)) is int


@pytest.mark.parametrize(
    "value", [0, -5, 10.0, "10", True, None, float("nan"), [3], torch.tensor([3, 4]), np.bool_(True)]
)
def test_what_is_no_count_is_refused_by_name(value):
    with pytest.raises(BadSetting, match=r"^expected steps to be an integer >= 1, got "):
        check_value("steps", value, PositiveInt)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_real_numbers_of_all_libraries_pass(value):
    assert check_value("eps", value, Positive) == 0.5 and type(check_value("eps", value, Share)) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, "8/255", False, 1 + 0j, None, np.ones(2), b"1"])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(BadSetting, match=r"^expected eps to be a finite number >= 0(.0)?, got "):
        check_value("eps", value, NonNegative)


def test_messages_show_value_type_and_remedy_in_one_line():
    with pytest.raises(BadSetting, match=re.escape("got '8/255' (str): write numbers without quotes, such as 8 / 255")):
        check_value("eps", "8/255", Number)
    with pytest.raises(BadSetting) as caught:
        check_value("x", torch.zeros(100, 100), Integer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_types_in_words():
    assert describe_type(PositiveInt | None) == "an integer >= 1 or None"
    assert describe_type(Literal["ce", "dlr"]) == "one of 'ce', 'dlr'"
    assert describe_type(list[Share]) == "a list, each entry a finite number >= 0 and <= 1"


def test_settings_follow_the_signature():
    def attack(x, *, steps: PositiveInt = 20, alpha: Positive | None = None, loss: Literal["ce", "dlr"] = "ce"):
        return x

    assert check_settings(partial(attack, steps=3), {"steps": np.int32(4), "alpha": None}) == {
        "steps": 4,
        "alpha": None,
    }
    with pytest.raises(BadSetting, match=r"expected pgd's alpha to be a finite number > 0 or None, got 0"):
        check_settings(attack, {"alpha": 0}, whose="pgd's ")
    with pytest.raises(BadSetting, match="one of 'ce', 'dlr', got 'hinge'"):
        check_settings(attack, {"loss": "hinge"})


def test_fields_of_a_dataclass_are_checked():
    @dataclass(frozen=True)
    class Settings:
        n: PositiveInt
        channels: tuple[PositiveInt, ...] = (1,)

        def __post_init__(self):
            check_fields(self)

    assert type(Settings(np.int64(2)).n) is int
    with pytest.raises(BadSetting, match=r"expected channels to be a tuple, each entry an integer >= 1, got"):
        Settings(1, (0, 1))
