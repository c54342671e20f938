"""Hashes of the code that the pipeline runs: `python -m lib.pipeline.code` writes `data/code/<experiment>.txt`.

They are those of `lib.utils.code_hash` for notebooks without the cells that are run by hand alone (`INTERACTIVE`): what
the pipeline does not run decides no result, so it may change without a rerun. Needs no torch.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.utils import code_hash
from lib.utils.files import ROOT, write_text

INTERACTIVE = "interactive"  # the tag of cells that are run by hand alone


def is_interactive(cell: dict[str, Any]) -> bool:
    """Return whether a notebook's cell is run by hand alone, and not by the pipeline."""
    return INTERACTIVE in cell["metadata"].get("tags", [])


@contextmanager
def sources_as_run(root: Path = ROOT) -> Iterator[Path]:
    """Yield a folder like `root` whose notebooks have only the cells that the pipeline runs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("lib", "data"):
            (folder / name).symlink_to(root / name, target_is_directory=True)
        (folder / "notebooks").mkdir()
        for path in (root / "notebooks").glob("*.ipynb"):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            notebook["cells"] = [cell for cell in notebook["cells"] if not is_interactive(cell)]
            (folder / "notebooks" / path.name).write_text(json.dumps(notebook), encoding="utf-8")
        yield folder


def pipeline_hashes(root: Path = ROOT) -> dict[str, str]:
    """Return the hash of every experiment, by the names of `lib.utils.code_hash.SOURCES`."""
    with sources_as_run(root) as folder:
        return {name: code_hash.code_hash(name, folder) for name in code_hash.SOURCES}


def check_pipeline_code(name: str, root: Path = ROOT) -> None:
    """Raise StaleCode, which names file and remedy, unless the written hash of an experiment is that of the code."""
    with sources_as_run(root) as folder:
        code_hash.check_code(name, folder)


def main() -> None:
    """Write the hash of every experiment; a file whose hash has not changed stays as it is."""
    for name, value in pipeline_hashes().items():
        write_text(ROOT / code_hash.CODE / f"{name}.txt", value + "\n")


if __name__ == "__main__":
    main()
