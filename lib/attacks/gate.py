"""The gate between an attack and a model: every pass is checked, brought to the model's precision, and watched.

What it watches is what an attack cannot say by itself: whether the model gave it a gradient at all. Without one a
gradient attack leaves every image as it is, which looks like robustness (Athalye et al. 2018a).
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.attacks.common import Images, Logits
from lib.utils.references import reachable_modules

HALF = (torch.float16, torch.bfloat16)


class AttackWarning(UserWarning):
    """What an attack met that its images alone do not show."""


class NoGradientWarning(AttackWarning):
    """An attack that follows gradients got none, or none that is a number: what it leaves is no robustness."""
