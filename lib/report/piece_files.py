"""What pieces of GPU minutes left on disk, read as the report needs it: cards of networks, and what attacks measured.

`lib.pipeline.pieces` writes them: networks with their cards below `data/pretrained/<data set>`, attacks with outcomes
per image below `data/<data set>/pieces`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.utils.artifacts import results_dir
from lib.utils.files import ROOT, read_json

Entry = dict[str, Any]
AUTOATTACKED, STUDENTS_PIECE, TEACHER_PIECE = "autoattack", "matched/students", "matched/teacher"
PLANNED = (  # all pieces of `lib.pipeline.pieces`, in its order
    *("resnet18", "diffusion/teacher", "diffusion/cd", "diffusion/pd", "resnet18-purified"),
    *("diffusion/clean", "diffusion/adaptive", "diffusion/label", "diffusion/label-n0"),
    *("resnet18-trades", "resnet50-trades", "resnet18-pgd-at", "resnet18-ard", "resnet18-rslad", "resnet18-guided"),
    *(f"{AUTOATTACKED}/{name}" for name in ("resnet18-trades", "resnet50-trades", "resnet18-pgd-at")),
    *(f"{AUTOATTACKED}/resnet18-{method}" for method in ("ard", "rslad", "guided")),
    *(STUDENTS_PIECE, TEACHER_PIECE, "kd/labels", "dd/temperatures"),
)
CARD_KEYS = ("command", "commit", "device", "metrics", "minutes", "recipe")
WRITER = "lib.pipeline.pieces"  # in the command of every piece, and of no other network of the repository
PROGRESSIVE_PIECE = "pd"  # writes networks of 4, 2 and 1 steps with one and the same card, that of one step last
TEACHER_DEFENCE, STUDENT_STEPS = "sde-100", 1  # of the matched set, where its file does not say them


def in_order(entries: dict[str, Entry], folder: str = "") -> dict[str, Entry]:
    """Return entries in the order of `PLANNED`, others last; `folder`: before each name there."""
    return dict(sorted(entries.items(), key=lambda item: [*PLANNED, folder + item[0]].index(folder + item[0])))


class Pieces(NamedTuple):
    """All finished pieces of a data set: trained classifiers and diffusion networks by name, and what was measured.

    `autoattack`: by the name of the classifier; `matched`, `others`: by the name of the piece.
    """

    dataset: str
    classifiers: dict[str, Entry]
    networks: dict[str, Entry]
    autoattack: dict[str, Entry]
    matched: dict[str, Entry]
    others: dict[str, Entry]

    def cards(self) -> Iterator[tuple[str, Entry]]:
        """Yield every finished piece as the table of pieces names it, in that table's order, others last."""
        named = self.classifiers | {f"diffusion/{name}": card for name, card in self.networks.items()}
        named |= {f"{AUTOATTACKED}/{name}": card for name, card in self.autoattack.items()}
        named |= self.matched | self.others
        yield from in_order(named).items()

    def missing(self) -> list[str]:
        """Return the names of planned pieces that are not finished."""
        finished = dict(self.cards())
        return [name for name in PLANNED if name not in finished]


def check_entry(path: Path, entry: Any, keys: tuple[str, ...]) -> Entry:
    """Return what a piece wrote; ValueError, which names the file, where it leaves something out."""
    lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if lacking:
        expected, got = ", ".join(keys), ", ".join(lacking)
        raise ValueError(f"{path}: expected {expected}, got none for {got}: run the piece again")
    return entry


def read_cards(dataset: str) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Return the cards of classifiers and of diffusion networks that pieces trained, by name."""
    folder = ROOT / "data/pretrained" / dataset
    cards = {path: read_json(path) for path in sorted(folder.glob("*/card.json"))}
    facts = {path: read_json(path).get("about") for path in sorted(folder.glob("diffusion/*/facts.json"))}
    classifiers, networks = (
        {p.parent.name: check_entry(p, c, CARD_KEYS) for p, c in some.items() if c and WRITER in c.get("command", "")}
        for some in (cards, facts)
    )
    last = networks.get(f"{PROGRESSIVE_PIECE}-1")
    networks = {name: card for name, card in networks.items() if not name.startswith(f"{PROGRESSIVE_PIECE}-")}
    networks |= {PROGRESSIVE_PIECE: last} if last else {}
    return in_order(classifiers), in_order(networks, "diffusion/")


def read_pieces(dataset: str) -> Pieces:
    """Return all finished pieces of a data set.

    Raises ValueError where there is none, and for a file that is not what a piece writes.
    """
    measured = {
        path.stem.replace("-", "/", 1): check_entry(path, read_json(path), (*CARD_KEYS, "outcomes"))
        for path in sorted(results_dir(dataset, "pieces").glob("*-*.json"))
    }
    for name, entry in measured.items():
        if (n := len(entry["outcomes"]["images"])) < 2:
            raise ValueError(f"{name}: expected two images or more, for intervals, got {n}: run it with more")
    parts: dict[str, dict[str, Entry]] = {"autoattack": {}, "matched": {}}
    for name, entry in measured.items():
        kind, _, rest = name.partition("/")
        parts.setdefault(kind if kind in parts else "others", {})[rest if kind == AUTOATTACKED else name] = entry
    pieces = Pieces(dataset, *read_cards(dataset), parts["autoattack"], parts["matched"], parts.get("others", {}))
    if not any(pieces[1:]):
        places = f"data/pretrained/{dataset} or data/{dataset}/pieces"
        raise ValueError(f"expected pieces in {places}, got none: run `python -m {WRITER} NAME …`")
    return pieces


def matched_record(measured: Entry, profile: str) -> dict[str, Any]:
    """Return a piece of the matched set as a record of experiment 5, which its figures, tables and claims read."""
    recipe = measured["recipe"]
    metrics = {"teacher": recipe.get("teacher", TEACHER_DEFENCE), "steps": recipe.get("steps", STUDENT_STEPS)}
    metrics |= measured["metrics"] | {key: recipe[key] for key in ("eps", "effort", "draws")}
    start = {"experiment": "dp", "profile": profile, "seed": recipe["seed"], "arrays": {}}
    return start | {"metrics": metrics, "outcomes": measured["outcomes"]}


def autoattack_record(pieces: Pieces) -> dict[str, Any]:
    """Return the outcomes of all classifiers under AutoAttack as those of one record, so that differences are paired.

    Raises ValueError unless all are about the same images and attacks.
    """
    correct, first = {}, next(iter(pieces.autoattack.values()))
    for name, measured in pieces.autoattack.items():
        alike = np.array_equal(measured["outcomes"]["images"], first["outcomes"]["images"])
        if not alike or measured["recipe"] != first["recipe"]:
            expected = "expected the images and settings of the other pieces, since differences are paired"
            raise ValueError(f"{AUTOATTACKED}/{name}: {expected}, got others: run it again")
        correct[name] = measured["outcomes"]["correct"][name]
    return {"outcomes": {"images": first["outcomes"]["images"], "correct": correct}}
