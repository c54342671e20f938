"""The images that tests of attacks share, unless they need others."""

import pytest


@pytest.fixture(scope="module")
def points(digits):
    x, y = digits
    return x[-12:], y[-12:]
