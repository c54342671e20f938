"""Conclusions say what the numbers say: in a world with an effect, in one without and in one with the opposite."""

import numpy as np
import pytest

from lib.report.sentences import defensive, estimates, kd, robust_distillation
from lib.utils.artifacts import results_dir
from lib.utils.draws import pack_draws
from lib.utils.files import read_json

N = 400


def answers(share, shift=0):
    """The answers to N images, so many of them right; the wrong ones are others for another shift."""
    bits = np.arange(N) < round(share * N)
    return np.roll(bits, shift)


def with_outcomes(record, shares, **more):
    """A record in which each key has a share of right answers."""
    correct = {}
    for (name, condition), share in shares.items():
        correct.setdefault(name, {})[condition] = pack_draws(answers(share)[None])
    images = list(range(1000 * record["seed"], 1000 * record["seed"] + N))
    return record | {"outcomes": {"images": images, "correct": correct, **more}}


def the(sentences, *words):
    """The one sentence with all these words."""
    (sentence,) = (s for s in sentences if all(word in s for word in words))
    return sentence


def test_a_difference_that_is_there_is_clear_and_one_that_is_not_is_not():
    def share(record, key):
        return record["metrics"][key[0]]

    a, b = ("a", "clean"), ("b", "clean")
    for old in (False, True):
        for first, second, word in ((0.9, 0.6, "up"), (0.6, 0.9, "down"), (0.7, 0.7, "none")):
            records = []
            for seed in range(3):
                noise = 0.0025 * (seed - 1)
                metrics = {"a": first + noise, "b": second - noise, "n_test": N}
                record = {"seed": seed, "metrics": metrics}
                records.append(record if old else with_outcomes(record, {a: metrics["a"], b: metrics["b"]}))
            for some in (records, records[:1]):
                e = estimates.difference(some, a, b, share)
                assert e.low <= e.mean <= e.high and e.mean == pytest.approx(100 * (first - second), abs=0.6)
                assert estimates.words(e, "up", "down", "none") == word
            assert estimates.mean_share(records, a, share) == pytest.approx(first, abs=0.01)


def test_an_interval_stays_within_what_a_difference_can_be():
    def share(record, key):
        return {"a": 1.0, "b": 0.0025}[key[0]]

    for n in (1, 3):
        records = [{"seed": k, "metrics": {"n_test": 30}} for k in range(n)]
        new = [with_outcomes(record, {(name, "clean"): share(None, name) for name in "ab"}) for record in records]
        for some in (records, new):
            e = estimates.difference(some, ("a", "clean"), ("b", "clean"), share)
            assert 90 < e.low <= e.mean <= e.high <= 100


def test_pairs_count_as_pairs():
    """Two networks that are right on nearly the same images differ clearly where independent ones would not."""
    shares = {("a", "clean"): 0.72, ("b", "clean"): 0.69}
    record = with_outcomes({"seed": 0, "metrics": {"n_test": N}}, shares)
    share = lambda record, key: shares[key]  # noqa: E731
    paired = estimates.difference([record], ("a", "clean"), ("b", "clean"), share)
    old = estimates.difference([{"metrics": {"n_test": N}}], ("a", "clean"), ("b", "clean"), share)
    assert paired.low > 0 > old.low and paired.mean == pytest.approx(old.mean)


def kd_record(seed, gain_all, slope, recall):
    """A record of experiment 1 in a world with this gain on all labels, slope of the temperature and recall."""
    students = {"100": {"labels": 100, "hard": 0.85, "soft": 0.9, "gain": 0.05}}
    students["all"] = {"labels": 1000, "hard": 0.9, "soft": 0.9 + gain_all, "gain": gain_all}
    grid = [[T, 0.9, 0.8, 0.85 + slope * k] for k, T in enumerate((1.0, 4.0, 20.0))]
    sweep = {"soft": {"grid": grid}, "hard": {"grid": [[0.0, 0.0, 0.8, 0.85]]}}
    tuned = {"T": 20.0, "alpha": 0.9, "soft": 0.85 + 2 * slope, "hard": 0.85}
    omitted = {kind: {"prior": {"recall": r}} for kind, r in (("soft", recall), ("hard", 0.1))} | {"class": 3}
    cost = {"teacher": {"test": 0.97, "parameters": 1000}, "student": {"test": 0.9 + gain_all, "parameters": 100}}
    metrics = {"n_test": N, "students": students, "tuned": tuned, "omitted": omitted, "cost": cost}
    metrics["relations"] = {"rho_T1": 0.5, "rho_chosen": 0.8 if recall > 0.5 else 0.02 * (1 - seed)}
    record = {"seed": seed, "metrics": metrics, "arrays": {"classes": list("0123456789"), "sweep": sweep}}
    shares = {(f"{kind}/{n}", "clean"): students[n][kind] for n in students for kind in ("hard", "soft")}
    shares |= {(f"sweep/soft/{T:g}/{a:g}", "clean"): test for T, a, _, test in grid}
    shares |= {(f"tuned/{kind}", "clean"): tuned[kind] for kind in ("hard", "soft")}
    shares |= {(name, "clean"): row["test"] for name, row in cost.items()}
    shares |= {(f"omitted/{kind}", "prior"): omitted[kind]["prior"]["recall"] for kind in ("hard", "soft")}
    labels = [3 if i % 10 == 0 else 5 for i in range(N)]
    return with_outcomes(record, shares, labels=labels)


def worlds(make, *settings):
    """The conclusions of three seeds, with and without outcomes, for each setting."""
    for values in settings:
        records = [make(seed, *values) for seed in range(3)]
        yield records
        yield [{k: v for k, v in record.items() if k != "outcomes"} for record in records]


def test_conclusions_of_experiment_1_follow_the_numbers():
    lose, old_lose, win, old_win = map(kd.kd_sentences, worlds(kd_record, (-0.02, 0.03, 0.9), (0.02, 0.0, 0.1)))
    for sentences in (lose, old_lose):
        assert "soft targets lose" in the(sentences, "With all 1,000 labels")
        assert "is larger than that with 1,000" in the(sentences, "The gain with 100 labels")
        assert "accuracy rises" in the(sentences, "From T = 1 to T = 20")
        assert "it is higher than that at T = 1" in the(sentences, "validation chose")
        assert "soft targets win" in the(sentences, "tuned on validation")
        assert "recognises more images of class 3" in the(sentences, "prior matching")
        assert "targets follows the similarity" in the(sentences, "order of class pairs")
    for sentences in (win, old_win):
        assert "soft targets give more accuracy" in the(sentences, "With all 1,000 labels")
        assert "accuracy does not clearly change" in the(sentences, "From T = 1 to T = 20")
        assert "not clearly different from that at T = 1" in the(sentences, "validation chose")
        assert "neither clearly wins" in the(sentences, "tuned on validation")
        assert "recognises not clearly more or fewer" in the(sentences, "prior matching")
        assert "does not clearly follow" in the(sentences, "order of class pairs")
    assert "3 seeds and their images" in lose[-1] and "Student's t" in old_lose[-1]


def dd_record(seed, worst, strong, zero):
    """A record of experiment 2 in which T = 1 keeps 0.3 at the smaller radius, T = 100 `worst` and `strong`."""
    jitter = 0.0025 * (seed - 1)

    def model(small, fgsm, clean):
        ball = {"eps": 0.1, "worst": small, "fgsm": fgsm, "fgsm/T": 0.3}
        return {
            "clean": clean, "l2": 1.0 + jitter, "small": ball, "large": ball | {"eps": 0.2, "worst": 0.0},
            "success": {"cw": 1.0, "jsma-f": 0.2, "jsma-z": 0.8}, "why": {"zero_float32": zero},
        }  # fmt: skip

    models = {"T1": model(0.3 + jitter, 0.35, 0.95), "T100": model(worst - jitter, 0.8, 0.9)}
    models |= {"kd-soft": model(0.3 + jitter, 0.35, 0.95), "kd-hard": model(0.3 - jitter, 0.35, 0.95)}
    left = {"T1": 0.3 + jitter, "T100": strong - jitter}
    metrics = {"n_test": N, "models": models}
    metrics["strong"] = {
        name: {b: {"accuracy": v if b == "small" else 0.0, "broke": {"x": 2}} for b in ("small", "large")}
        for name, v in left.items()
    }
    record = {"seed": seed, "metrics": metrics, "arrays": {"temperatures": [1.0, 100.0]}}
    keys = [(m, c) for m in models for c in ("clean", "jsma-f", "jsma-z")]
    keys += [(m, f"{a}@{e}") for m in models for a in ("fgsm", "fgsm/T", "worst") for e in (0.1, 0.2)]
    keys += [(m, f"strong@{e}") for m in left for e in (0.1, 0.2)]
    return with_outcomes(record, {key: defensive.defensive_share(record, key) for key in keys})


def test_conclusions_of_experiment_2_follow_the_numbers():
    none, old_none, real, old_real = map(
        defensive.defensive_sentences, worlds(dd_record, (0.3, 0.3, 0.9), (0.44, 0.4, 0.1))
    )
    for sentences in (none, old_none):
        assert "it does not clearly change: 30.0 % against 30.0 %" in the(sentences, "In the worst case", "30.0 %")
        assert "the rest is masked gradients" in the(sentences, "In the worst case", "30.0 %")
        assert "no clear difference between the two ends is left" in the(sentences, "stronger attack", "30.0 %")
        assert "exactly 0 on most images from T = 1 on" in the(sentences, "float32 gradient")
    for sentences in (real, old_real):
        assert "it rises: 44.0 % against 30.0 %" in the(sentences, "In the worst case", "44.0 %")
        assert "highest temperature is more robust still: 40.0 %" in the(sentences, "stronger attack", "30.0 %")
        assert "It broke 6 more images" in the(sentences, "stronger attack", "40.0 %")
        assert "on most images at no temperature" in the(sentences, "float32 gradient")
    for sentences in (none, real):
        assert "accuracy falls" in the(sentences, "Without an attack")
        assert "restores FGSM" in the(sentences, "dividing the logits")
        assert "leaves less accuracy than" in the(sentences, "JSMA on logits")
        assert "not clearly more or less robust" in the(sentences, "Experiment 1's student")


def rd_record(seed, guided, left, teacher_gain):
    """A record of experiment 3: our method, what is left at the largest radius, the strong teacher's gain."""
    jitter = 0.0025 * (seed - 1)
    robust = {"natural": 0.1, "kd": 0.3, "pgd-at": 0.6, "trades": 0.7, "trades-at": 0.7, "ard": 0.6, "rslad": 0.6}
    robust |= {"teach": 0.7, "guided": guided}
    methods = {
        m: {
            "clean": 0.9,
            "robust": v + jitter,
            "quick": v,
            "last": v,
            "score": 0.9 if m == "ard" else 0.5,
            "attacks": {},
        }
        for m, v in robust.items()
    }
    others = {f"teacher/{m}/natural": {"robust": robust[m] - teacher_gain + jitter} for m in ("kd", "rslad", "guided")}
    teachers = {"trades": {"entropy_clean": 0.4}, "natural": {"entropy_clean": 0.1}}
    metrics = {"n_test": N, "methods": methods, "others": others, "teachers": teachers, "few_labels": 0}
    arrays = {"classes": list("0123456789"), "radii": [0.1, 0.5]}
    arrays["curves"] = {m: [robust[m], left if m == "trades" else 0.05] for m in ("natural", "trades", "guided")}
    arrays["diagnosis"] = {"guided": {"flag": [left > 0.1, False]}, "kd": {"flag": [False]}}
    record = {"seed": seed, "metrics": metrics, "arrays": arrays}
    keys = [(m, c) for m in methods for c in ("worst", "quick")] + [(name, "quick") for name in others]
    keys += [("last/trades", "quick"), *((m, "pgd@0.5") for m in arrays["curves"])]
    return with_outcomes(record, {key: robust_distillation.robust_share(record, key) for key in keys})


def test_conclusions_of_experiment_3_follow_the_numbers():
    gain, old_gain, none, old_none = map(
        robust_distillation.robust_sentences, worlds(rd_record, (0.8, 0.05, 0.1), (0.7, 0.5, 0.0))
    )
    for sentences in (gain, old_gain):
        assert "(ours) is more robust than TRADES:" in the(
            sentences, "Guided TRADES", "80.0 % against 70.0 %", "than TRADES:"
        )
        assert "makes its student more robust than a natural one" in the(sentences, "With RSLAD")
        assert "no curve is above chance, 10.0 %" in the(sentences, "At the largest radius")
        assert "No sanity check is red." in sentences
    for sentences in (none, old_none):
        assert "not clearly more or less robust than TRADES:" in the(sentences, "Guided TRADES", "than TRADES:")
        assert "no clear gain over a natural one" in the(sentences, "With RSLAD")
        assert "1 of 3 curves are still above chance" in the(sentences, "At the largest radius")
        assert "Sanity checks are red: 3 of guided TRADES (ours)." in sentences
    for sentences in (gain, none):
        assert "(ARD) is less robust than TRADES" in the(sentences, "published", "than TRADES")
        assert "entropy 0.40 against 0.10" in the(sentences, "labels are softer than")


@pytest.mark.parametrize(
    "experiment, conclude",
    [
        ("kd", kd.kd_sentences),
        ("dd", defensive.defensive_sentences),
        ("rd", robust_distillation.robust_sentences),
    ],
)
def test_conclusions_can_be_drawn_from_the_committed_records(experiment, conclude):
    committed = sorted(results_dir("digits", "records").glob(f"{experiment}-s*.json"))
    for files in (committed[:1], committed[:2]):
        sentences = conclude([read_json(file) for file in files])
        assert len(sentences) > 5 and all(s.endswith(".") and "nan" not in s for s in sentences)
