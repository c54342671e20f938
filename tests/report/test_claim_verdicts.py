"""Claims on synthetic records: planted effects are seen, planted mistakes are errors, rules decide as written."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from lib.report import claim_results, claim_tables, claim_values, claims, preregistration, readme
from lib.report.claim_schema import load_claims, parse_claim
from lib.report.claim_verdicts import NO_MARGIN, NOT_MEASURED
from lib.utils.draws import pack_draws
from lib.utils.files import ROOT
from lib.utils.intervals import mean_interval

MISSING = object()
STUDENT = {"defence": "student", "threat": "matched", "measure": "accuracy"}
TEACHER = STUDENT | {"defence": "teacher"}


def entry(**changes):
    """Returns an entry of claims.yaml about a number of the metrics, or, with `plus`, about outcomes."""
    fields = {"id": "kd.x", "statement": "s", "of": "kd", "kind": "exploratory", "value": "a.x", "rule": "above"}
    fields |= {"margin": 0, "scale": 100, "unit": "points", "published": None}
    if "plus" in changes:
        del fields["value"]
    return {key: value for key, value in (fields | changes).items() if value is not MISSING}


def confirming(records, profile="digits"):
    """Returns records as those of a confirming run, and the protocol of it."""
    frozen = {"name": "protocol 1", "commit": "a" * 40, "changed": []}
    records = [record | {"seed": seed, "protocol": frozen} for seed, record in enumerate(records, start=20)]
    seeds = {profile: {"kd": [record["seed"] for record in records]}}
    return records, frozen | {"date": "2026-01-01", "seeds": seeds, "earlier": ["A trial was seen."]}


def evaluate(records, *entries, profile="digits"):
    parsed, (records, protocol) = [parse_claim(e, e["id"]) for e in entries], confirming(records, profile)
    return claims.evaluate_claims({"kd": records}, parsed, profile, protocol)


def decide(values, profile="digits", **changes):
    """Returns the result of one claim about a number that has these values, one for each seed."""
    return evaluate([{"metrics": {"a": {"x": v}, "n_test": 500}} for v in values], entry(**changes), profile=profile)[0]


def outcome_records(clean, attacked, *, n_seeds=5, n=100, draws=40):
    """Returns records with a teacher and a student; each image has its own accuracy, shared by both of them.

    Args:
        clean, attacked: mean accuracy by defence.
        n_seeds, n, draws: numbers of seeds, images of each, and draws of each image.
    """
    records = []
    for seed in range(n_seeds):
        rng = np.random.default_rng(seed)
        shift = rng.uniform(-0.1, 0.1, n)
        correct = {
            name: {
                condition: pack_draws(rng.random((draws, n)) < means[name] + shift)
                for condition, means in (("clean", clean), ("matched", attacked))
            }
            for name in clean
        }
        images = rng.choice(2000, n, replace=False).tolist()
        records.append({"metrics": {}, "outcomes": {"images": images, "correct": correct}})
    return records


def planted(effect, **sizes):
    """Returns records in which the student keeps `effect` more than the teacher of equal accuracy on clean images."""
    clean = {"teacher": 0.85, "student": 0.85}
    return outcome_records(clean, {"teacher": 0.5, "student": 0.5 + effect}, **sizes)


def compare(effect, **changes):
    sizes = {key: changes.pop(key) for key in ("n_seeds", "n") if key in changes}
    return evaluate(planted(effect, **sizes), entry(plus=STUDENT, minus=TEACHER, **changes))[0]


@pytest.mark.parametrize("kind", ["exploratory", "primary"])
def test_planted_effects_are_seen(kind):
    null = compare(0.0, rule="equivalent", margin=2, kind=kind)
    assert null["verdict"] == "equivalent" and null["p"] < 0.05
    gain = compare(0.05, kind=kind)
    assert gain["verdict"] == "supported" and gain["value"] == pytest.approx(5, abs=1)
    assert compare(0.05, rule="below", kind=kind)["verdict"] == "refuted"
    assert compare(-0.05, kind=kind)["verdict"] == "refuted"
    assert compare(0.05, rule="equivalent", margin=2, kind=kind)["verdict"] == "different"
    assert compare(0.05, rule="above", margin=5.0, kind=kind)["verdict"] == "inconclusive"


def test_a_result_says_what_it_rests_on():
    result = compare(0.05, kind="primary")
    assert (result["n_seeds"], result["n_images"], result["over"]) == (5, 500, "seeds and images")
    assert len(result["per_seed"]) == 5 and np.mean(result["per_seed"]) == pytest.approx(result["value"])
    assert result["ci95"][0] < result["ci90"][0] < result["value"] < result["ci90"][1] < result["ci95"][1]
    assert 0 < result["p"] == result["p_holm"] < 0.01 and result["bootstrap95"][0] < result["value"]
    assert {
        "id",
        "statement",
        "experiment",
        "kind",
        "rule",
        "margin",
        "verdict",
        "agrees",
        "published",
    } <= result.keys()


def test_losses_are_clean_minus_attacked():
    records = outcome_records({"teacher": 0.8, "student": 0.9}, {"teacher": 0.6, "student": 0.7})
    measures = {}
    for measure in ("accuracy", "worst_of_10", "loss", "worst_loss"):
        operands = {"plus": STUDENT | {"measure": measure}, "minus": TEACHER | {"measure": measure}}
        measures[measure] = evaluate(records, entry(**operands))[0]["value"]
    assert measures["accuracy"] == pytest.approx(10, abs=1) and measures["loss"] == pytest.approx(0, abs=1)
    clean = [
        evaluate(records, entry(plus=o | {"threat": "clean", "measure": "worst_of_10"}))[0] for o in (STUDENT, TEACHER)
    ]
    gain = clean[0]["value"] - clean[1]["value"]
    assert measures["worst_loss"] == pytest.approx(gain - measures["worst_of_10"]) and gain > 5
    one = evaluate(records, entry(plus=STUDENT | {"measure": "loss"}))[0]  # no minus: the loss itself
    assert one["value"] == pytest.approx(20, abs=1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defence": "studnet"}, r"claim kd.x: plus.defence: .*expected 'studnet', got the keys teacher, student"),
        ({"threat": "matchd"}, r"claim kd.x: plus.threat: .*expected 'matchd', got the keys clean, matched"),
        ({"threat": "matchd", "measure": "loss"}, r"claim kd.x: plus.threat: .*expected 'matchd'"),
    ],
)
def test_a_misspelt_defence_or_threat_is_an_error(changes, message):
    with pytest.raises(LookupError, match=message):
        evaluate(planted(0.0), entry(plus=STUDENT | changes, minus=TEACHER))
    with pytest.raises(LookupError, match=r"claim kd.x: plus: outcomes is not in the records"):
        evaluate([{"metrics": {}}], entry(plus=STUDENT))


@pytest.mark.parametrize("changes", [{"value": "a.y"}, {"value": "b.x"}, {"value": "a.x.z"}, {"count": "n"}])
def test_a_misspelt_path_is_an_error(changes):
    with pytest.raises(
        LookupError, match=r"claim kd.x: (value|count): .* is not in the records: expected '[ybzn]', got "
    ):
        decide([0.1, 0.2], **changes)
    with pytest.raises(LookupError, match=r"a\.y is not in the records: expected 'y', got the keys x: correct it"):
        decide([0.1, 0.2], value="a.y", profiles=["digits"])
    with pytest.raises(LookupError, match=r"claim kd\.x: value: a: expected a number"):
        decide([0.1, 0.2], value="a")


def test_only_profiles_that_are_named_may_lack_a_number():
    result = decide([0.1, 0.2], value="a.y", profiles=["mnist"])
    assert (result["verdict"], result["value"], result["agrees"]) == (NOT_MEASURED, None, "–")
    assert decide([0.1, None])["verdict"] == NOT_MEASURED  # null: measured, and no value
    assert decide([])["verdict"] == NOT_MEASURED  # the profile runs no seed of this experiment


def test_operands_about_other_images_are_an_error():
    records = planted(0.0)
    student = records[2]["outcomes"]["correct"]["student"]
    student["matched"]["images"] = records[2]["outcomes"]["images"][::-1]
    with pytest.raises(ValueError, match=r"claim kd.x: minus: expected the images of the other operand"):
        evaluate(records, entry(plus=STUDENT, minus=TEACHER))
    with pytest.raises(ValueError, match=r"claim kd.x: plus.threat: expected the images of the other operand"):
        evaluate(records, entry(plus=STUDENT | {"measure": "loss"}))
    student["matched"] = pack_draws(np.ones((40, 64), dtype=bool))
    with pytest.raises(ValueError, match=r"expected answers to 100 images of student, matched, got 64"):
        evaluate(records, entry(plus=STUDENT))


def test_one_seed_decides_nothing_but_an_exploratory_claim_by_many_images():
    result = compare(0.05, n_seeds=1, n=400)
    assert (result["verdict"], result["over"]) == ("supported", "images of one seed")
    assert compare(0.05, n_seeds=1, n=399)["verdict"] == "inconclusive"
    assert compare(0.05, n_seeds=1, n=400, kind="primary")["verdict"] == "inconclusive"
    assert decide([0.5])["verdict"] == "inconclusive" and decide([0.5])["ci95"] == [None, None]
    assert decide([0.0], rule="zero")["verdict"] == "inconclusive"


def test_a_verdict_follows_from_rule_and_margin_alone():
    assert decide([0.01, 0.02, 0.03])["verdict"] == "inconclusive"  # mean above 0, interval not
    assert decide([0.019, 0.02, 0.021])["verdict"] == "supported"
    assert decide([0.019, 0.02, 0.021], margin=2)["verdict"] == "inconclusive"
    assert decide([0.019, 0.02, 0.021], margin=3)["verdict"] == "refuted"
    assert decide([-0.019, -0.02, -0.021], rule="below")["verdict"] == "supported"
    assert decide([0.019, 0.02, 0.021], rule="below")["verdict"] == "refuted"
    assert decide([0.0, 0.001, -0.001], rule="equivalent", margin=1)["verdict"] == "equivalent"
    assert decide([0.01, 0.02, -0.03], rule="equivalent", margin=1)["verdict"] == "inconclusive"  # noise proves nothing
    assert decide([-0.019, -0.02, -0.021], rule="equivalent", margin=1)["verdict"] == "different"
    assert decide([0.0, 0.0, 0.0], rule="zero")["verdict"] == "supported"
    assert decide([0.0, 0.01, 0.0], rule="zero")["verdict"] == "refuted"


def test_the_90_percent_interval_decides_equivalence_and_the_95_percent_interval_difference():
    values = [0.0, 0.01, 0.02]  # 90 %: 1 ± 1.69 points, 95 %: 1 ± 2.48
    assert decide(values, rule="equivalent", margin=2.7)["verdict"] == "equivalent"
    assert decide(values, rule="equivalent", margin=2.6)["verdict"] == "inconclusive"


def test_a_margin_may_be_of_one_data_set():
    margin = {"digits": 97, "fashion-mnist": 80}
    values, one = [0.9, 0.901, 0.899], {"rule": "above", "margin": margin}
    assert decide(values, **one)["verdict"] == "refuted" and decide(values, **one)["margin"] == 97
    assert decide(values, profile="fashion-mnist-gpu", **one)["verdict"] == "supported"  # the same data set
    other = decide(values, profile="mnist", **one)
    assert (other["verdict"], other["margin"]) == (NO_MARGIN, None) and other["value"] == pytest.approx(90)
    assert decide(values, margin=None)["verdict"] == NO_MARGIN


def test_primary_claims_need_an_adjusted_p_value_too():
    records = [{"metrics": {"a": {"x": 0.019 + 0.001 * i, "y": 0.011 + 0.005 * i}}} for i in range(3)]
    strong, weak = entry(id="kd.a", kind="primary"), entry(id="kd.b", kind="primary", value="a.y")
    alone, both = evaluate(records, weak)[0], evaluate(records, strong, weak, weak | {"id": "kd.c"})
    assert alone["verdict"] == "supported" and 0.025 < alone["p"] == alone["p_holm"] < 0.05
    assert [r["verdict"] for r in both] == ["supported", "inconclusive", "inconclusive"]
    assert both[1]["p_holm"] == pytest.approx(2 * both[1]["p"]) and both[0]["p_holm"] == pytest.approx(3 * both[0]["p"])
    absent = weak | {"id": "kd.c", "of": "rd"}  # not run: it still counts
    assert evaluate(records, weak, absent)[0]["verdict"] == "inconclusive"
    exploratory = weak | {"id": "kd.c", "kind": "exploratory"}
    mixed = evaluate(records, weak, exploratory)
    assert mixed[0]["verdict"] == mixed[1]["verdict"] == "supported" and mixed[1]["p_holm"] is None


def spoil(records, protocol, what):
    """Change one thing about a confirming run."""
    state = records[1]["protocol"]
    if what == "no protocol":
        del records[1]["protocol"]
    elif what == "another commit":
        records[1]["protocol"] = state | {"commit": "b" * 40}
    elif what == "changed then":
        records[1]["protocol"] = state | {"changed": ["lib/report/claims.yaml"]}
    elif what == "changed now":
        protocol["changed"] = ["lib/report/claims.yaml"]
    elif what == "one seed less":
        del records[-1]
    elif what == "another seed":
        records[-1]["seed"] = 3


REASONS = {
    "no protocol": "made before protocol 1",
    "another commit": "made under protocol 1 of commit bbbbbbb",
    "changed then": "made after changes to lib/report/claims.yaml",
    "changed now": "lib/report/claims.yaml changed since",
    "one seed less": "not those of protocol 1, seeds 20, 21, 22",
    "another seed": "not those of protocol 1, seeds 20, 21, 22",
}


@pytest.mark.parametrize("what", REASONS)
def test_a_primary_claim_is_exploratory_unless_its_records_carry_the_unchanged_protocol(what):
    records, protocol = confirming([{"metrics": {"a": {"x": 0.019 + 0.001 * i}}} for i in range(3)])
    claim = parse_claim(entry(kind="primary"), "kd.x")
    text = preregistration.protocol_text({"kd": records}, "digits", protocol)
    assert "**protocol 1**, commit `aaaaaaa`, 2026-01-01" in text and "changed since: none." in text
    assert "knowledge distillation: seeds 20, 21, 22; made under protocol 1, unchanged" in text
    assert "- A trial was seen." in text
    (result,) = claims.evaluate_claims({"kd": records}, [claim], "digits", protocol)
    assert result["kind"] == "primary" and result["p_holm"] is not None
    spoil(records, protocol, what)
    (result,) = claims.evaluate_claims({"kd": records}, [claim], "digits", protocol)
    assert (result["kind"], result["p_holm"]) == ("exploratory", None)
    text = preregistration.protocol_text({"kd": records}, "digits", protocol)
    assert f"; {REASONS[what]}: exploratory" in text
    assert ("changed since: `lib/report/claims.yaml`." in text) == (what == "changed now")


def test_a_primary_claim_that_became_exploratory_still_counts_in_holms_adjustment():
    records, protocol = confirming([{"metrics": {"a": {"x": 0.019 + 0.001 * i}}} for i in range(3)])
    parsed = [parse_claim(entry(id=f"{of}.x", of=of, kind="primary"), "x") for of in ("kd", "dd")]
    before = [record | {"protocol": None} for record in records]
    one, other = claims.evaluate_claims({"kd": records, "dd": before}, parsed, "digits", protocol)
    assert one["p_holm"] == pytest.approx(2 * one["p"]) and other["p_holm"] is None


@pytest.mark.parametrize(
    ("values", "rule", "says", "agrees"),
    [
        ([0.02, 0.021, 0.019], "above", "above", "yes"),
        ([0.02, 0.021, 0.019], "below", "above", "yes"),  # the claim is refuted, the publication is not
        ([-0.02, -0.021, -0.019], "below", "above", "no"),  # the claim is supported: the opposite of the publication
        ([0.02, -0.021, 0.019], "above", "above", "–"),
        ([0.0, 0.001, -0.001], "equivalent", "equivalent", "yes"),
        ([0.05, 0.051, 0.049], "equivalent", "equivalent", "no"),
        ([0.0, 0.03, -0.03], "equivalent", "equivalent", "–"),
        ([0.05, 0.051, 0.049], "equivalent", "above", "yes"),
        ([0.002, 0.0021, 0.0019], "equivalent", "above", "no"),
        ([0.5], "above", "above", "–"),
    ],
)
def test_agreement_with_the_publication_is_computed(values, rule, says, agrees):
    published = {"figure": "+3 points", "agrees": says, "reference": "Somebody"}
    margin = 1 if rule == "equivalent" else 0
    assert decide(values, rule=rule, margin=margin, published=published)["agrees"] == agrees
    assert decide(values, rule=rule, margin=margin)["agrees"] == "–"


def test_paths_may_be_subtracted_and_shares_end_at_100():
    records = [{"metrics": {"a": {"x": 0.5 + d, "y": 0.4}}} for d in (0, 0.01, 0.02)]
    result = evaluate(records, entry(plus={"path": "a.x"}, minus={"path": "a.y"}))[0]
    assert (result["value"], *result["ci95"]) == pytest.approx(mean_interval([10, 11, 12]))
    assert (result["over"], result["n_seeds"]) == ("seeds", 3) and decide([0.1, 0.2], count="n_test")[
        "n_images"
    ] == 1000
    assert decide([0.99, 1.0, 1.0], unit="%")["ci95"][1] == 100.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(treshold=1.0)], r"claim kd.x: unknown treshold: expected id, statement"),
        ([entry(rule=MISSING)], r"claim kd.x: missing rule"),
        ([entry(published=MISSING)], r"claim kd.x: missing published"),
        ([entry(), {"statement": "s"}], r"claim number 2: missing id"),
        ([entry(rule="belove")], r"claim kd.x: rule: expected one of above, .*, got 'belove'"),
        ([entry(kind="main")], r"claim kd.x: kind: expected one of primary, exploratory, got 'main'"),
        ([entry(margin="high")], r"claim kd.x: margin: expected a number, .*, got 'high'"),
        ([entry(margin=math.nan)], r"claim kd.x: margin: expected a number"),
        ([entry(margin={"digits": "x"})], r"claim kd.x: margin: expected a number"),
        ([entry(margin=0, rule="equivalent")], r"claim kd.x: margin: expected a number above 0"),
        ([entry(margin=None, kind="primary")], r"claim kd.x: margin: expected a margin of a primary claim"),
        ([entry(margin=1, rule="zero")], r"claim kd.x: margin: expected 0"),
        ([entry(kind="primary", rule="zero")], r"claim kd.x: kind: expected exploratory"),
        ([entry(scale=0)], r"claim kd.x: scale: expected a number above 0, got 0"),
        ([entry(profiles="digits")], r"claim kd.x: profiles: expected a list of profiles"),
        (
            [entry(minus={"path": "a.y"})],
            r"claim kd.x: operands: expected value, or plus, or plus and minus, got 'value, m",
        ),
        ([entry(plus=STUDENT, minus={"path": "a.y"})], r"claim kd.x: minus: expected .* both of one kind"),
        (
            [entry(plus=STUDENT | {"measure": "acuracy"})],
            r"claim kd.x: plus.measure: expected one of accuracy, worst_of_10",
        ),
        ([entry(plus=STUDENT | {"threat": "clean", "measure": "loss"})], r"claim kd.x: plus.threat: expected a threat"),
        ([entry(plus={"defence": "student"})], r"claim kd.x: plus: expected path, or defence, threat, measure"),
        ([entry(plus=STUDENT, count="n_test")], r"claim kd.x: count: expected no count"),
        ([entry(published={"figure": "x"})], r"claim kd.x: published: expected figure, agrees and reference, or null"),
        (
            [entry(published={"figure": "x", "agrees": "yes", "reference": "y"})],
            r"claim kd.x: published.agrees: expected one of above, below, equivalent, got 'yes'",
        ),
        ([entry(), entry()], r"claim kd.x: id: expected a unique one"),
        (
            [entry(id=f"kd.{i}", kind="primary") for i in range(9)],
            r"expected at most 8 primary claims, got 9: kd.0, kd.1",
        ),
    ],
)
def test_a_wrong_entry_in_the_claims_file_is_named(tmp_path, entries, message):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(ValueError, match=message):
        load_claims(tmp_path / "claims.yaml")


@pytest.mark.parametrize(("text", "message"), [("", "a list of claims"), ("a: 1", "a list of"), ("- 1", "a list of")])
def test_a_file_that_holds_no_claims_is_refused(tmp_path, text, message):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_claims(tmp_path / "claims.yaml")


def test_a_table_has_estimate_seeds_and_verdict():
    table = claim_tables.claims_table([decide([0.01, 0.02, 0.03], count="n_test")])
    assert "**Experiment 1: classic knowledge distillation**" in table
    assert "+2.00 [-0.48, +4.48] points | 1, 2, 3 |" in table and "3 seeds × 500 images; over seeds" in table


def test_profiles_stand_side_by_side():
    published = {"figure": "3 %", "agrees": "above", "reference": "Somebody"}
    here = decide([0.019, 0.02, 0.021], published=published, kind="primary")
    there = decide([0.01, 0.02, 0.03], published=published)
    table = claim_tables.compare_profiles({"digits": [here], "Fashion-MNIST": [there]})
    head, _, row = table.splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell.split(":")[0].strip() for cell in head.strip("|").split("|")][1:3] == ["digits", "Fashion-MNIST"]
    assert (
        "+2.00 [+1.75, +2.25] points; 1.9, 2, 2.1; 3 seeds" in cells[1]
        and "primary: supported, p = 0.00083" in cells[1]
    )
    assert "inconclusive" in cells[2] and cells[3:] == ["Somebody: 3 %", "yes, –"]
    with pytest.raises(ValueError, match="results of the same claims"):
        claim_tables.compare_profiles({"a": [here], "b": []})


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["lib.claims", *arguments])
    claims.main()
    return capsys.readouterr().out


def test_the_command_checks_primary_claims_and_that_none_errs(monkeypatch, capsys):
    out = run_main(monkeypatch, capsys, "--profile", "digits", "--check")
    assert "inconclusive" in out and f"{len(load_claims())} claims: " in out
    saved = claims.load_results("digits")
    primary = [saved[0] | {"kind": "primary", "verdict": "refuted"}]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"refuted: kd\.teacher"):
        patch.setattr(claims, "load_results", lambda profile: primary)
        patch.setattr(claims, "check_results", lambda profile, results: None)
        run_main(patch, capsys, "--check")
    changed = [saved[0] | {"value": 1.0}, *saved[1:]]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"got other results of kd\.teacher: run `dvc"):
        patch.setattr(claims, "load_results", lambda profile: changed)
        run_main(patch, capsys, "--profile", "digits", "--check")
    wrong = parse_claim(entry(value="teacher.tset"), "kd.x")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"claim kd.x: value: teacher.tset is not in"):
        patch.setattr(claims, "load_claims", lambda: [wrong])
        run_main(patch, capsys, "--profile", "digits", "--check")


def test_the_command_writes_the_readmes_computed_parts_and_the_table(monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(claims, "write_text", lambda path, text: written.update({path.name: text}))
    run_main(monkeypatch, capsys, "--profile", "digits", "--readme")
    for page in readme.PAGES:  # every number in their computed parts is the records'
        assert written[Path(page).name] == (ROOT / page).read_text("utf-8")
    assert written["claims.md"] == (ROOT / "data/digits/claims.md").read_text("utf-8")
    assert all(f"| `{claim.id}` |" in written["claims.md"] for claim in load_claims())


def test_the_readmes_conclusions_follow_other_records(monkeypatch, capsys):
    """In a world where students keep less, its sentences are others."""
    saved = claims.saved_records("digits")
    before = readme.readme_blocks(saved, claims.load_results("digits"))
    other = copy.deepcopy(saved)
    for record in other["dp"]:
        correct = record["outcomes"]["correct"]
        correct["clean-1"]["matched"] = correct["none"]["matched"]
    after = readme.readme_blocks(other, claims.load_results("digits"))
    assert {name for name in before if before[name] != after[name]} == {"dp"}
    assert set(before) == {"kd", "dd", "rd", "diff", "dp"} and all(body.startswith("- ") for body in before.values())


def test_the_short_answer_counts_the_primary_claims_that_were_confirmed_or_not():
    protocol = {"name": "protocol 7", "commit": "abcdef1234", "seeds": {"p": {"dp": [5, 6]}}}
    row = {"experiment": "dp", "value": 4.0, "ci95": [3.0, 5.0], "unit": "points"}
    rows = [row | {"kind": "primary", "statement": f"s{k}", "verdict": v} for k, v in enumerate(["supported"] * 2)]
    rows += [row | {"kind": "primary", "statement": "no", "verdict": "refuted"}]
    rows += [row | {"kind": "exploratory", "statement": "perhaps", "verdict": "supported"}]
    text = readme.short_answer(rows, protocol, "p")
    assert text.startswith("3 claims were fixed in commit `abcdef1` (protocol 7)") and "seeds 5, 6" in text
    assert "2 supported, 1 refuted" in text and "| no | **refuted** | +4.0" in text and "perhaps" not in text
    assert readme.short_answer(rows[3:], protocol, "p").startswith("No record was made under protocol 7")


def test_blocks_go_between_their_marks():
    text = "a\n<!-- kd -->\nold\n<!-- end of kd -->\nb\n"
    new = readme.replace_blocks(text, {"kd": "- new"})
    assert (
        new == "a\n<!-- kd -->\n- new\n<!-- end of kd -->\nb\n" and readme.replace_blocks(new, {"kd": "- new"}) == new
    )
    with pytest.raises(ValueError, match="<!-- dd --> and <!-- end of dd -->, once each"):
        readme.replace_blocks(text, {"dd": ""})


def test_blocks_go_to_the_page_that_has_their_marks():
    mark = "<!-- {0} -->\nold\n<!-- end of {0} -->\n".format
    pages = {"a": mark("kd") + mark("fig") + "![x](figures/p/fig.png)", "b": mark("dd") + "![x](../figures/p/dd.png)"}
    new = readme.fill_pages(pages, {"kd": "1", "dd": "2"}, {"fig": "3", "other": "4"})
    assert new["a"] == pages["a"].replace("kd -->\nold", "kd -->\n1").replace("fig -->\nold", "fig -->\n3")
    assert new["b"] == pages["b"].replace("old", "2")
    with pytest.raises(ValueError, match="expected <!-- rd --> in a or b, got none"):
        readme.fill_pages(pages, {"rd": ""}, {})
    with pytest.raises(ValueError, match=r"^b: expected the lines <!-- dd -->"):
        readme.fill_pages(pages | {"b": 2 * pages["b"]}, {"dd": ""}, {})


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 220 and len([word for word in text.split() if re.search(r"\w", word)]) <= 1200


def test_a_profile_has_the_data_set_of_the_one_it_is_like(monkeypatch, tmp_path):
    monkeypatch.setattr(claim_results, "ROOT", tmp_path)
    (tmp_path / "profiles").mkdir()
    for name, text in (
        ("base", "data: {dataset: digits}"),
        ("a", "like: b"),
        ("b", "data: {dataset: x}"),
        ("c", "k: 1"),
    ):
        (tmp_path / f"profiles/{name}.yaml").write_text(text)
    assert [claim_results.dataset_of(name) for name in ("a", "b", "c", "base")] == ["x", "x", "digits", "digits"]
    (tmp_path / "profiles/b.yaml").write_text("like: a")
    with pytest.raises(ValueError, match=r"expected a data set in profiles/a\.yaml"):
        claims.dataset_of("a")


def test_an_accuracy_needs_no_ten_draws_and_worst_of_ten_does():
    correct = np.array([[True, False, True, True], [False, False, True, True]])
    outcomes = {"images": [3, 1, 2, 0], "correct": {"a": {"grey": pack_draws(correct)}}}
    records = [{"metrics": {}, "outcomes": outcomes}]
    operand = {"defence": "a", "threat": "grey", "measure": "accuracy"}
    base = {k: v for k, v in entry(value="x").items() if k not in ("value", "count")}
    estimate = claim_values.estimate_outcomes(parse_claim(base | {"plus": operand}, "kd.x"), records)
    assert estimate.value == pytest.approx(100 * 0.625) or estimate.value == pytest.approx(0.625)
    with pytest.raises(ValueError, match="at least 10 draws"):
        worst = base | {"plus": operand | {"measure": "worst_of_10"}}
        claim_values.estimate_outcomes(parse_claim(worst, "kd.x"), records)
