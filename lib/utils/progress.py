"""Progress bars in a terminal, in JupyterLab and, for a notebook that `lib.pipeline.notebook` runs, in its terminal."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm as auto
from tqdm.std import tqdm as plain


def tqdm(iterable: Iterable | None = None, *, disable: bool = False, **options: Any) -> plain:
    """Return a tqdm bar; in a notebook run by `lib.pipeline.notebook` it appears on the caller's terminal instead.

    `DISTILL_PROGRESS` names the file that `lib.pipeline.notebook` copies to its standard error.
    """
    path = os.environ.get("DISTILL_PROGRESS")
    if path and not disable:
        stream = open(path, "a", buffering=1, encoding="utf-8")  # lives as long as the bar
        return plain(
            iterable, file=stream, disable=False, mininterval=1.0, ascii=True, ncols=90, leave=False, **options
        )
    return auto(iterable, disable=disable or None, **options)
