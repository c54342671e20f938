"""What the fuzz tests share: how many examples, and what counts as a clear refusal.

In CI each test draws the same examples every time (`derandomize`); `FUZZ=30 pytest tests/fuzz` draws 30 times as many,
other ones at each call.
"""

import os
import traceback
from pathlib import Path

from hypothesis import HealthCheck, settings

from lib.utils.files import ROOT

FACTOR = int(os.environ.get("FUZZ", "1"))
DEEP = (AssertionError, AttributeError, NotImplementedError, UnboundLocalError, RecursionError, MemoryError)


def examples(n: int) -> settings:
    """Returns hypothesis's settings for a test of `n` examples, times FUZZ."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=n * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


def check_refusal(error: BaseException) -> None:
    """Fails unless an error is a refusal by the project's own code: one line, from a `raise` in lib, naming a value."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT / "lib")]
    text = str(error)
    assert not isinstance(error, DEEP), f"{type(error).__name__} from inside: {text}"
    assert own and Path(last.filename).is_relative_to(ROOT / "lib"), f"raised in {last.filename}:{last.lineno}: {text}"
    assert text and "\n" not in text.strip(), f"expected one line, got {text!r}"
    assert len(text) < 600, f"expected a short message, got {len(text)} characters"
