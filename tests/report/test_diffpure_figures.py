"""Experiment 5's figures show, and its sentences say, what is planted in synthetic records."""

import copy
import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from lib.report.figures import diffpure, diffpure_defences, diffpure_protocols
from lib.report.sentences import diffpure as diffpure_sentences
from lib.report.sentences import diffpure_attacks
from lib.utils.draws import image_measures, unpack_draws

spec = importlib.util.spec_from_file_location("diffpure_records", Path(__file__).with_name("diffpure_records.py"))
diffpure_records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diffpure_records)
synthetic_record, EVERY, FEW = (getattr(diffpure_records, n) for n in ("synthetic_record", "EVERY", "FEW"))


@pytest.fixture(scope="module")
def many():
    return [synthetic_record(seed) for seed in range(3)]


def points(axes) -> dict:
    """Where the points with error bars are: (rounded row, open or filled) → (value, low, high)."""
    out = {}
    for bars in (c for c in axes.containers if isinstance(c, ErrorbarContainer)):
        line, _, (segments,) = bars
        (x,), (y,) = line.get_xdata(), line.get_ydata()
        ends = segments.get_segments()[0][:, 0]
        out[round(y), line.get_markerfacecolor() == "white"] = (x, *ends)
    return out


@pytest.mark.parametrize("name", diffpure.FIGURES)
def test_a_figure_is_drawn_from_any_defences_and_seeds_and_says_what_its_bars_are(name, many):
    for records in (many, [synthetic_record(0, FEW)], [synthetic_record(s, FEW, n=12) for s in (0, 1)]):
        figure = diffpure.FIGURES[name](records)
        parts = [t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert isinstance(figure, Figure) and any(a.has_data() or a.images or a.get_title() for a in figure.axes)
        if name not in ("dp_pictures", "dp_diagnosis") and not (name == "dp_noise" and records is not many):
            assert any(f"{len(records)} seed" in t or ("one seed" in t and len(records) == 1) for t in parts), parts
        plt.close(figure)


def test_the_headline_shows_losses_controls_and_attacked_worst_of_ten(many):
    figure = diffpure.dp_headline(many)
    words = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    loss, ten = map(points, figure.axes)
    for name in EVERY:
        row = words.index(diffpure_defences.defence_label(name))
        results = [r["metrics"]["defences"][name] for r in many]
        means = {k: 100 * np.mean([r[k] for r in results]) for k in ("loss", "control", "worst_of_10")}
        value, low, high = loss[row, False]
        assert value == pytest.approx(means["loss"]) and low < value < high
        assert ten[row, True][0] == pytest.approx(means["control"])
        assert ten[row, False][0] == pytest.approx(means["worst_of_10"])
        assert min(ten[row, False]) >= 0 and max(ten[row, True]) <= 100
    heads = [words.index(group) for group in diffpure_defences.GROUPS]
    assert heads == sorted(heads) and words.index("TRADES") > heads[1] > words.index("no purifier")
    plt.close(figure)


def test_differences_are_paired_within_images_and_show_each_seed(many):
    figure = diffpure.dp_differences(many)
    words = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    row = next(i for i, w in enumerate(words) if w.startswith("student + constraint, 1 step\n− student of clean"))
    per_seed = []
    for record in many:
        a, b = (record["outcomes"]["correct"][n] for n in ("adaptive-1", "clean-1"))
        shares = [unpack_draws(d[c]).mean(0) for d in (a, b) for c in ("clean", "matched")]
        per_seed.append(100 * float(np.mean(shares[0] - shares[1] - shares[2] + shares[3])))
    assert points(figure.axes[0])[row, False][0] == pytest.approx(np.mean(per_seed))
    dots = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3 and round(line.get_ydata()[0]) == row]
    assert any(list(dot.get_xdata()) == pytest.approx(per_seed) for dot in dots)
    assert np.mean(per_seed) < 0 < points(figure.axes[1])[row, False][0]
    plt.close(figure)


def test_attacks_have_one_column_for_all_transferred_images_and_what_is_outside_the_ball_last(many):
    table = diffpure.attack_accuracies(many)
    assert list(table.columns[-3:]) == ["worst\ntransferred", "worst per\nimage", "outside,\n2 ε"]
    assert len(table) == len(EVERY)
    outside = 100 * np.mean([r["metrics"]["defences"]["sde-100"]["outside"] for r in many])
    assert table.loc["DiffPure (teacher), 100 steps", "outside,\n2 ε"] == pytest.approx(outside)
    results = [r["metrics"]["defences"]["sde-100"]["attacks"] for r in many]
    least = min(np.mean([a[k] for a in results]) for k in results[0] if k.startswith("from "))
    assert table.loc["DiffPure (teacher), 100 steps", "worst\ntransferred"] == pytest.approx(100 * least)


def test_inflation_goes_from_the_most_flattering_protocol_to_the_matched_set(many):
    table = diffpure_protocols.inflation_table(many)
    rows = list(table.index)
    assert rows[0] == "no attack" and rows[1] == "attack on the bare classifier"
    assert rows.index("attack without gradient (Square)") < rows.index("gradient averaged over draws")
    student = table["student + constraint, 1 step"]
    bits = [unpack_draws(r["outcomes"]["correct"]["adaptive-1"]["matched"]) for r in many]
    assert student["worst attack per image"] == pytest.approx(100 * np.mean([b.mean() for b in bits]))
    assert student[rows[-1]] == pytest.approx(100 * np.mean([image_measures(b)["worst_of_10"].mean() for b in bits]))
    assert np.isnan(table.loc["gradient of a one-step surrogate", "undistilled, 1 step"])
    turned = [synthetic_record(s, shares={"grey": 0.95, "bpda": 0.1}) for s in range(3)]
    assert diffpure_protocols.inflation_table(turned).index[1] == "BPDA, purifier as identity"


def test_queries_begin_at_the_average_and_deterministic_defences_are_flat(many):
    figure = diffpure.FIGURES["dp_queries"](many)
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    teacher = curves["DiffPure (teacher), 100 steps"]
    results = [r["metrics"]["defences"]["sde-100"] for r in many]
    assert len(teacher) == 40 and (np.diff(teacher) <= 1e-9).all() and teacher[-1] < teacher[0] - 5
    assert teacher[0] == pytest.approx(100 * np.mean([r["accuracy"] for r in results]))
    assert teacher[9] == pytest.approx(100 * np.mean([r["worst_of_10"] for r in results]))
    assert np.ptp(curves["TRADES"]) == 0 and len(curves["TRADES"]) == 40
    plt.close(figure)
    few = [synthetic_record(0, FEW, draws=12)]
    assert diffpure_protocols.query_numbers(few, "sde-100") == list(range(1, 13))


def test_certificates_end_at_their_ceiling_and_within_100_percent(many):
    for i, record in enumerate(many):  # seeds differ, so that bars would pass 100 %
        accuracy = record["metrics"]["certified"]["accuracy"]
        accuracy["adaptive/0.17"] = [v - 0.02 * i for v in accuracy["adaptive/0.17"]]
    figure = diffpure.FIGURES["dp_certified"](many)
    for axes, ceiling in zip(figure.axes, (0.2096, 0.4192), strict=True):
        assert any(list(line.get_xdata()) == [ceiling, ceiling] for line in axes.lines)
        for bars in axes.containers:
            ends = np.concatenate([s[:, 1] for s in bars[2][0].get_segments()])
            assert ends.min() >= 0 and ends.max() <= 100 and bars[0].get_xdata().max() < ceiling
    plt.close(figure)


def test_every_method_has_its_own_look_and_every_defence_its_words():
    looks = [tuple(map(str, diffpure_defences.defence_style(n).values())) for n in EVERY]
    methods = [diffpure_defences.method_of(n) for n in EVERY]
    assert len(set(looks)) == len(set(methods)) and len({*map(diffpure_defences.defence_label, EVERY)}) == len(EVERY)


def test_students_with_a_label_term_in_one_step_have_shares_of_the_noise():
    record = {"outcomes": {"correct": dict.fromkeys([*EVERY, "label-n25-2", "label-1 + trades"])}}
    shares = {"label-1": 1.0, "label-n50-1": 0.5, "label-n25-1": 0.25, "label-n0-1": 0.0}
    assert diffpure_defences.noise_shares([record]) == shares


def test_the_table_over_seeds_has_each_defence_once(many):
    table = diffpure.diffpure_over_seeds(many)
    assert table.loc["TRADES", "loss, average"] == pytest.approx(10) and table.index.is_unique
    assert (table["clean"] - table["attacked, average"]).to_numpy() == pytest.approx(table["loss, average"].to_numpy())


def world(**planted) -> str:
    records = [synthetic_record(s, n=100, **planted) for s in range(3)]
    return "\n".join(diffpure_sentences.diffpure_conclusions(records))


def test_two_worlds_give_different_sentences():
    losses = {"clean-1": 0.2, "clean-2": 0.2, "adaptive-1": 0.1, "trades": 0.3, "label-n0-1": 0.4, "label-1": 0.15}
    inherited = world(losses=losses, shaky=dict.fromkeys(["sde-100", "clean-1", "adaptive-1", "label-1"], 0.02))
    losses = {"clean-1": 0.35, "clean-2": 0.36, "adaptive-1": 0.45, "trades": 0.05, "label-n0-1": 0.1, "label-1": 0.1}
    lost = world(losses=losses, shares={"exact-ce": 0.99, "from adaptive-1": 0.1})
    assert "Does the student inherit robustness? Yes, all of it" in inherited
    assert "Does the student inherit robustness? Not all of it" in lost
    assert "points of it are noise" in inherited and "is noise, which costs accuracy" in lost
    assert "most often images made for “student + constraint, 1 step”" in inherited
    assert "most often the averaged gradient of the cross-entropy" in lost
    for text, sign in ((inherited, "-"), (lost, "+")):
        (line,) = [t for t in text.splitlines() if t.startswith("The constraint (student + constraint, 1 step")]
        assert line.partition("minus student of clean pairs, 1 step): ")[2][0] == sign
        (line,) = [t for t in text.splitlines() if t.startswith("TRADES, without")]
        assert ("average: less" if sign == "-" else "average: more") in line


def test_without_a_robust_teacher_there_is_nothing_to_inherit():
    assert "There is none shown to inherit" in world(losses={"sde-100": 0.4, "none": 0.4})


def test_few_images_decide_nothing_and_the_fewest_defences_suffice():
    records = [synthetic_record(0, FEW, n=12)]
    text = "\n".join(diffpure_sentences.diffpure_conclusions(records))
    assert "no difference shown within [" in text and "Evidence: 1 seed, 12 images" in text and "TRADES" not in text


def test_the_word_of_a_difference_follows_its_interval():
    images = list(range(400))
    one = {"outcomes": {"images": images}}
    noise = np.tile([0.1, -0.1], 200)
    estimates = [
        diffpure_defences.estimate_values([one], [m + s * noise]) for m, s in ((-0.1, 1), (0.1, 1), (0, 1), (0, 9))
    ]
    words = [diffpure_sentences.difference_word(e) for e in estimates]
    assert words[:3] == ["less", "more", "equivalent within 2 points"] and words[3].startswith("no difference shown")


def test_a_worst_image_that_is_weaker_than_one_attack_alone_is_said_to_be(many):
    """And where it is not, that too."""
    said = [diffpure_attacks.choice_sentences(changed(many, shift))[0] for shift in (0.1, -0.1)]
    assert "is weaker than" in said[0] and "overstated" in said[0] and "is no weaker than" in said[1]
    assert "overstated" not in said[1]


def test_every_red_check_is_named_and_what_is_outside_the_ball_is_told_apart(many):
    named = [line for line in diffpure_sentences.diffpure_conclusions(many) if "checks that are red" in line]
    assert len(named) == 1 and "“more steps” of " in named[0] and f"in 1 of {len(many)} seeds" in named[0]
    green = copy.deepcopy(many)
    for record in green:
        for table in record["arrays"]["diagnosis"].values():
            table["flag"] = [False] * len(table["flag"])
    assert diffpure_attacks.red_check_sentences(green) == ["No sanity check is red."]
    for record in green:
        record["arrays"]["diagnosis"] = {}
    assert diffpure_attacks.red_check_sentences(green) == []
    bits = [unpack_draws(r["outcomes"]["correct"]["sde-100"]["outside"]).mean() for r in many]
    assert f"{100 * np.mean(bits):.1f} %" in diffpure_attacks.outside_sentences(many)[0]


def changed(records, shift):
    """Records whose worst images leave that much more than the least of their attacks alone."""
    out = copy.deepcopy(records)
    for record in out:
        for row in record["metrics"]["defences"].values():
            row["accuracy"] = min(row["attacks"].values()) + shift
    return out
