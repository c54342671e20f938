"""The leaderboard: entries are complete or refused, the most robust in ten draws stands first."""

import copy
import sys

import pytest

from lib import __main__ as commands
from lib.commands import leaderboard
from lib.commands.measures import REPORTED
from lib.utils.files import ROOT, write_json

SHARE = {"value": 0.5, "low": 0.4, "high": 0.6}
ENTRY = {
    "about": {"title": "A defence", "authors": "Somebody"},
    "name": "x before y",
    "dataset": "digits",
    "eps": 0.1,
    "norm": "Linf",
    "n": 100,
    "random": True,
    "draws": 10,
    "seed": 0,
    "commit": "abc",
    "protocol": {"attacks": "matched", "effort": "standard"},
    "measures": {name: SHARE for name in REPORTED},
    "attacks": {"exact-ce": {"accuracy": 0.5, "forward": 9, "backward": 7, "no_gradient": 0}},
    "red": [],
    "gradients_per_image": 400.0,
    "number_forward_passes": 1,
    "multiply_adds": 1032704,
    "outcomes": {"images": []},
}


def changed(path, value):
    """An entry with one field, at a dotted path, changed, or removed for None."""
    entry = copy.deepcopy(ENTRY)
    *above, last = path.split(".")
    node = entry
    for key in above:
        node = node[key]
    node[last] = value
    if value is None:
        del node[last]
    return entry


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("measures.control", None, "measures.control: field required, got nothing there"),
        ("draws", None, "draws: field required"),
        ("seed", None, "seed: field required"),
        ("attacks.exact-ce.backward", None, "attacks.exact-ce.backward: field required"),
        ("gradients_per_image", None, "gradients_per_image: field required"),
        ("gradients_per_image", 0.0, "gradients_per_image: input should be greater than 0, got 0.0"),
        ("attacks", {}, "attacks: dictionary should have at least 1 item"),
        ("draws", 9, "draws: expected at least 10 of a random defence, got 9"),
        ("n", 99, "n: input should be greater than or equal to 100, got 99"),
        ("red", ["no gradient"], "red: list should have at most 0 items"),
        ("protocol", {"effort": "quick"}, "protocol.effort: expected standard, got 'quick'"),
        ("norm", "L7", "norm: input should be 'Linf' or 'L2', got 'L7'"),
        ("measures.clean.value", 1.2, "measures.clean.value: input should be less than or equal to 1, got 1.2"),
        ("about", None, "about: field required, got nothing there"),
        ("about.title", "", "about.title: string should have at least 1 character"),
    ],
)
def test_an_entry_that_leaves_out_what_counts_is_refused(tmp_path, path, value, message):
    write_json(tmp_path / "entry.json", changed(path, value))
    with pytest.raises(ValueError, match=r"entry\.json: ") as error:
        leaderboard.check_entry_file(tmp_path / "entry.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_complete_entry_passes(tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "entry.json", ENTRY)
    monkeypatch.setattr(sys, "argv", ["lib", "leaderboard", "--check", str(tmp_path / "entry.json")])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert not left.value.code and "A defence: complete, 100 images" in capsys.readouterr().out
    one = changed("random", False) | {"draws": 1}
    write_json(tmp_path / "one.json", one)
    assert leaderboard.check_entry_file(tmp_path / "one.json").draws == 1  # a deterministic one needs no more


def test_the_most_robust_in_ten_draws_stands_first():
    entries = []
    for title, worst, mean in (("second", 0.5, 0.9), ("first", 0.6, 0.7), ("third", 0.5, 0.8)):
        entry = changed("about.title", title)
        entry["measures"] |= {"worst_of_10": SHARE | {"value": worst}, "robust": SHARE | {"value": mean}}
        entries.append(leaderboard.LeaderboardEntry.model_validate(entry))
    other = leaderboard.LeaderboardEntry.model_validate(changed("eps", 0.2))
    page = leaderboard.board_page({str(k): entry for k, entry in enumerate([*entries, other])})
    assert page.index("| 1 | first | ") < page.index("| 2 | second | ") < page.index("| 3 | third | ")
    assert "## digits, Linf, ε = 0.1" in page and "## digits, Linf, ε = 0.2" in page
    assert "60.0 [40.0, 60.0]" in page and "| 1.03 | matched | 400 | 100 |" in page


def test_the_committed_page_is_that_of_the_committed_entries():
    folder = ROOT / leaderboard.BOARD
    entries = {path.stem: leaderboard.check_entry_file(path) for path in sorted((folder / "entries").glob("*.json"))}
    assert {"digits-adaptive-1", "digits-trades", "digits-sde-100"} <= entries.keys()
    assert (folder / "README.md").read_text(encoding="utf-8") == leaderboard.board_page(entries)
