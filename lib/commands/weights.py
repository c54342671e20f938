"""The weights that come with the repository: `python -m lib weights`, see `--help`."""

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.diffusion.network import load_facts
from lib.diffusion.network_files import CARD, WEIGHTS
from lib.pretrained import (
    CLASSIFIER_WEIGHTS,
    DIFFUSION_FOLDER,
    PRETRAINED,
    classifier_names,
    diffusion_names,
    pretrained_folder,
)
from lib.report.claim_tables import markdown_rows
from lib.utils.files import ROOT, read_json, write_text
from lib.utils.specs import PurifierSpec

SHOWN = ("load by", "no attack", "control", "under attack", "ten of ten")
SHOWN += ("training images", "minutes", "kB", "SHA-256")
SHARES = ("clean", "control", "accuracy", "worst_of_10")
PAGE = PRETRAINED / "README.md"


def weights_row(call: str, about: Mapping[str, Any], measured: Mapping[str, Any], path: Path) -> list[str]:
    """Return a row of the table: call, what the card says was measured, data, minutes, size and SHA-256."""
    shares = [f"{100 * measured[key]:.1f}" if key in measured else "" for key in SHARES]
    content = path.read_bytes()
    images = about["data"].get("training images", "") if isinstance(about["data"], Mapping) else ""
    size = [f"{about['minutes']:.1f}", f"{len(content) / 1000:.0f}", f"`{hashlib.sha256(content).hexdigest()[:12]}`"]
    return [f"`{call}`", *shares, f"{images}", *size]


def weights_rows() -> Iterator[list[str]]:
    """Yield the rows of all classifiers and of all purifiers that were measured, or of a network where none was."""
    for name in classifier_names():
        folder = pretrained_folder(name)
        card = read_json(folder / CARD)
        measured = next((row for row in card["metrics"].values() if isinstance(row, Mapping)), {})
        yield weights_row(f'lib.models.load("{name}")', card, measured, folder / CLASSIFIER_WEIGHTS)
    for name in diffusion_names():
        dataset = name.removesuffix(f"/{DIFFUSION_FOLDER}")
        for folder in sorted(path.parent for path in pretrained_folder(name).glob(f"*/{WEIGHTS}")):
            about = load_facts(folder)["about"]
            alone = {key: row for key, row in about["metrics"].items() if " + " not in key and isinstance(row, Mapping)}
            plain = folder.name if folder.name.startswith("pd-") else f"{folder.name}-1"
            default = "ddim-1" if folder.name == "teacher" else plain
            for purifier in sorted(alone or {default: {}}, key=lambda key: (PurifierSpec.parse(key).steps, key)):
                call = f'lib.purify.load("{dataset}/{purifier}")'
                yield weights_row(call, about, alone.get(purifier, {}), folder / WEIGHTS)


def weights_page() -> str:
    """Return the page of all weights that come with the repository."""
    head = (
        "# Weights\n\nWritten by `python -m lib weights --write` from the cards. Safetensors alone, whose SHA-256 is "
        "checked at every load. Shares of test images in %, as the card states them; purifiers before the classifier "
        "`natural` of their data set, under the matched set of attacks; blank where nothing was measured. `limits` in "
        "each card says of how many images and seeds.\n\n"
    )
    return head + markdown_rows(SHOWN, list(weights_rows())) + "\n"


def main() -> int:
    """List the weights that come with the repository, with what their cards say of them.

    Exit status: 0; 1 for an error.
    """
    parser = argparse.ArgumentParser(prog="python -m lib weights", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the page to {PAGE}")
    args = parser.parse_args()
    if args.write:
        write_text(ROOT / PAGE, weights_page())
    print(PAGE if args.write else weights_page())
    return 0
