"""Results on disk, intervals, and claims decided by their rules; the README's table is generated."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from scipy import stats as scipy_stats

from lib import claims, results
from lib.diagnose import CHECKS
from lib.dp import claimed
from lib.models import build
from lib.paths import ROOT
from lib.stats import clopper_pearson, mean_interval, wilson


def test_wilson_and_clopper_pearson_against_their_formulas():
    k, n, z = 7, 20, scipy_stats.norm.ppf(0.975)
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    assert wilson(k, n) == pytest.approx((centre - half, centre + half))
    beta = scipy_stats.beta
    assert clopper_pearson(k, n) == pytest.approx((beta.ppf(0.025, k, n - k + 1), beta.ppf(0.975, k + 1, n - k)))
    assert clopper_pearson(0, 10)[0] == 0 and clopper_pearson(10, 10)[1] == 1
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


def test_mean_interval_is_students_t():
    values = [1.0, 2.0, 4.0]
    expected = scipy_stats.t.interval(0.95, 2, np.mean(values), scipy_stats.sem(values))
    assert mean_interval(values) == pytest.approx((np.mean(values), *expected))
    assert mean_interval([3.0])[0] == 3 and all(map(math.isnan, mean_interval([3.0])[1:]))
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])


@pytest.fixture
def profile(tmp_path, monkeypatch):
    for module in (results, claims):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return "p"


def test_results_are_canonical_and_complete(profile, tmp_path):
    metrics = {"b": torch.tensor(0.5), "a": {"x": np.float32(1), "bad": math.nan}, "n": 3}
    record = results.save(profile, "kd", 0, metrics=metrics, arrays={"m": torch.eye(2)}, timing={"ms": 1.5})
    text = (tmp_path / "data/p/metrics/kd-s0.json").read_text()
    assert json.loads(text) == {"a": {"bad": None, "x": 1.0}, "b": 0.5, "n": 3} and text.index('"a"') < text.index(
        '"b"'
    )
    assert results.load(profile, "kd", [0]) == [record]
    assert json.loads((tmp_path / "data/p/timing/kd-s0.json").read_text()) == {"ms": 1.5}
    assert "ms" not in (tmp_path / "data/p/records/kd-s0.json").read_text()  # a clock's answer is no metric
    with pytest.raises(FileNotFoundError, match=r"records/kd-s4.json is missing: run `dvc repro kd@p-4`"):
        results.load(profile, "kd", [0, 4])


def test_models_are_kept_as_safetensors(profile, tmp_path):
    model = build("cnn", width=4, seed=3)
    results.save_model(model, profile, "m")
    other = results.load_model(build("cnn", width=4, seed=4), profile, "m")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert [f.name for f in (tmp_path / "data/p/models").iterdir()] == ["m.safetensors"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        results.load_model(model, profile, "nothing")


def claim(**changes):
    fields = {"id": "kd.x", "statement": "s", "value": "a.x", "rule": "above", "threshold": 0.0, "expected": "e"}
    return claims.Claim(**(fields | {"source": "paper"} | changes))


def rows_of(values, **changes):
    records = [{"metrics": {"a": {"x": v}, "n_test": 500}} for v in values]
    return claims.evaluate({"kd": records}, [claim(**changes)])[0]


def test_a_verdict_follows_from_the_rule_alone():
    assert rows_of([0.01, 0.02, 0.03])["verdict"] == claims.NOT_REPRODUCED  # mean above 0, interval not
    assert rows_of([0.019, 0.02, 0.021])["verdict"] == claims.REPRODUCED
    assert rows_of([0.01, 0.02, 0.03], rule="mean", threshold=2.0)["verdict"] == claims.REPRODUCED
    assert rows_of([0.01, 0.02, 0.03], rule="mean", threshold=2.1)["verdict"] == claims.NOT_REPRODUCED
    assert rows_of([0.5])["verdict"] == claims.NOT_APPLICABLE  # one seed decides nothing
    assert rows_of([0.5, 0.5], value="a.y")["verdict"] == claims.NOT_APPLICABLE
    assert rows_of([])["verdict"] == claims.NOT_APPLICABLE
    assert rows_of([-0.019, -0.02, -0.021], rule="below")["verdict"] == claims.REPRODUCED
    assert rows_of([-0.01, -0.02, -0.03], rule="below")["verdict"] == claims.NOT_REPRODUCED
    assert rows_of([0.01, 0.02, 0.03], rule="not above")["verdict"] == claims.REPRODUCED
    assert rows_of([0.019, 0.02, 0.021], rule="not above")["verdict"] == claims.NOT_REPRODUCED
    assert rows_of([0.0, 0.0, 0.0], rule="every")["verdict"] == claims.REPRODUCED
    assert rows_of([0.0, 0.01, 0.0], rule="every")["verdict"] == claims.NOT_REPRODUCED  # though no mean is far from 0
    with pytest.raises(ValueError, match="rule 'belove'"):
        rows_of([0.1, 0.2], rule="belove")


def test_a_row_says_value_interval_and_n():
    row = rows_of([0.01, 0.02, 0.03])
    assert row["value"] == pytest.approx(2.0) and (row["n_seeds"], row["n_examples"]) == (3, 500)
    assert row["ci95"] == pytest.approx(mean_interval([1.0, 2.0, 3.0])[1:])
    assert {"id", "statement", "unit", "expected", "source", "verdict", "rule"} <= row.keys()
    assert rows_of([0.01, 0.02], count="a.x")["n_examples"] == 0.01  # the images that this number is about, not others


def test_the_interval_of_a_share_ends_at_100():
    assert rows_of([0.99, 1.0, 1.0], unit="%", rule="mean")["ci95"][1] == 100.0


def test_a_table_goes_between_its_marks():
    marks = "<!-- claims: written by `python -m lib.claims --readme` -->", "<!-- end of claims -->"
    body = claims.table([rows_of([0.01, 0.02, 0.03])])
    new = claims.between_marks(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n", "claims", body)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert "+2.00 [-0.48, +4.48] points" in new and claims.between_marks(new, "claims", body) == new
    with pytest.raises(ValueError, match="needs the lines"):
        claims.between_marks("nothing", "claims", body)


def test_ids_are_unique_and_the_readme_shows_the_committed_claims():
    assert len({c.id for c in claims.CLAIMS}) == len(claims.CLAIMS)
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]
    assert claims.between_marks(readme, "claims", claims.table(rows)) == readme
    assert [r["id"] for r in rows] == [c.id for c in claims.CLAIMS]


def test_what_the_readme_says_about_experiment_5_is_what_was_measured():
    found = [json.loads(p.read_text()) for p in sorted((ROOT / "data/digits/metrics").glob("dp-s*.json"))]
    rows = {r["id"]: r for r in json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]}
    assert len(found) == 3 and {m["n_test"] for m in found} == {32} and {m["budget"]["draws"] for m in found} == {10}
    behind = []
    for metrics in found:
        summary = metrics["summary"]
        assert summary["inherited_clean_one_minus_teacher"] > 0 and summary["match_sde_minus_ode_to_denoiser"] < 0
        assert summary["inherited_noskip_minus_skip"] > 0 > summary["noskip_minus_skip_average"]
        assert summary["grey_adaptive_minus_clean"] > 0 < summary["adaptive_few_minus_teacher_average"]
        assert summary["adaptive_one_minus_teacher_average"] > 0
        less = [line for line in metrics["beaten"] if line.startswith("sde-100: sweep") and "images for" in line]
        own, lent = metrics["threats"]["sde-100/sweep"]["average"], metrics["strongest"]["sde-100"]["average"]
        assert less and own > lent
        behind.append(100 * (own - lent))
    assert round(max(behind), 1) == 3.4
    assert all(set(m["red"]) == set(claimed(2)) and not any(m["red"].values()) for m in found)
    held = {name for name, row in rows.items() if row["verdict"] == claims.REPRODUCED}
    assert {"dp.inherits", "dp.inherits_less", "dp.match_sde"} <= held
    assert {f"dp.constraint_{n}{more}" for n in ("one", "few") for more in ("", "_many")} <= held
    for name in ("dp.constraint_grey", "dp.noskip", "dp.adaptive_one_average", "dp.adaptive_few_average"):
        assert rows[name]["ci95"][0] < 0 < rows[name]["value"]
    for n in ("one", "few"):
        row = rows[f"dp.adaptive_{n}_worst"]
        assert [round(v, 1) for v in (row["value"], *row["ci95"])] == [13.5, 1.7, 25.4]
    assert [round(rows[f"dp.speed_{n}"]["value"]) for n in (1, 2)] == [96, 49]
    assert 89.9 < rows["dp.speed_1"]["ci95"][0] < 90 and "dp.speed_2" in held and rows["dp.speed_1"]["n_seeds"] == 5
    assert not {"dp.clean_few_average", "dp.clean_few_worst"} & held
    low = [rows[f"dp.clean_few_{what}"]["ci95"] for what in ("average", "worst")]
    assert all(lower < -1 < upper for lower, upper in low)  # within the intervals
    worst = {name: np.mean([m["strongest"][name]["worst"] for m in found]) for name in found[0]["strongest"]}
    assert max(worst.values()) <= worst["nothing-0"] + 1e-9


def test_what_the_readme_says_about_the_teachers_diagnosis_is_what_was_measured():
    found = {f.name: json.loads(f.read_text()) for f in (ROOT / "data/digits/audit").glob("diagnosis-s*.json")}
    assert found.keys() == {"diagnosis-s0.json", "diagnosis-s1.json", "diagnosis-s2.json"}
    for table in found.values():
        assert table["teacher"] == "sde-100" and table["n_diagnosed"] == 40
        assert table["red"] == sum(table["flag"]) == 0 and len(table["check"]) == len(CHECKS)


def test_what_the_readme_says_about_experiments_2_and_3_is_what_was_measured():
    rows = {r["id"]: r for r in json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]}
    low, high = rows["dd.kd_student"]["ci95"]
    assert low < 0 < high and rows["dd.kd_student"]["n_examples"] == 100
    assert rows["rd.gain_pgd_at"]["ci95"][0] > 0 > rows["rd.gain_trades"]["ci95"][1]
    assert rows["rd.published"]["ci95"][1] < 0 < rows["rd.few_labels"]["ci95"][0]
    low, high = rows["rd.few_labels_soft"]["ci95"]
    assert low < 0 < high
    assert yaml.safe_load((ROOT / "params.yaml").read_text())["rd"]["epochs"] == 16


def test_what_the_readme_says_about_a_second_machine_is_what_was_measured():
    files = "metrics/claims.json", "audit/claims-second-machine.json"
    here, there = (json.loads((ROOT / "data/digits" / f).read_text())["claims"] for f in files)
    verdicts = [{row["id"]: (row["verdict"], row["n_seeds"], row["rule"]) for row in rows} for rows in (here, there)]
    assert verdicts[0] == verdicts[1]
    moved = {a["id"]: (a["value"], b["value"], b["ci95"]) for a, b in zip(here, there, strict=True)}
    assert sum(a != b for a, b, _ in moved.values()) > len(moved) / 3  # another machine, not a copy
    ours, other, interval = moved["rd.gain_trades"]
    assert [round(v, 1) for v in (ours, other, *interval)] == [-1.2, 1.2, -2.0, 4.4]
    for name in ("rd.gain_pgd_at", "rd.kd_robust", "rd.few_labels"):
        assert all(row["ci95"][0] > 0 for rows in (here, there) for row in rows if row["id"] == name)
    assert all(row["ci95"][1] < 0 for rows in (here, there) for row in rows if row["id"] == "rd.published")


def test_what_the_readme_says_about_experiment_4_is_what_was_measured():
    found = [json.loads(p.read_text()) for p in sorted((ROOT / "data/digits/metrics").glob("diff-s*.json"))]
    assert len(found) >= 3
    for metrics in found:
        distance = {way: row["distance"] for way, row in metrics["sweep"].items()}
        assert distance["cd-1"] < distance["ddim-2"] and distance["cd-1"] < distance["pd-1"]
        assert all(distance[f"pd-{n}"] < distance[f"ddim-{n}"] for n in (1, 2, 4))
        assert distance["pd-8"] > distance["ddim-8"] and distance["cd-1"] < distance["cd-2"] < distance["cd-4"]
        assert metrics["cost"]["cd_equals_pd"] < 1


def test_what_the_readme_says_about_fashion_mnist_is_what_was_measured():
    data = ROOT / "data"
    rows = json.loads((data / "fashion-mnist/metrics/claims.json").read_text())["claims"]
    assert {row["verdict"] for row in rows} == {claims.NOT_APPLICABLE} and {row["n_seeds"] for row in rows} <= {0, 1}
    found, digits = (json.loads((data / f"{p}/metrics/dp-s0.json").read_text()) for p in ("fashion-mnist", "digits"))
    assert found["red"] == {} and found["n_test"] == found["threats"]["sde-100/sweep"]["n"] == 64
    assert found["threats"]["adaptive-2/many"]["n"] == 256
    weak, grey = (found["threats"][f"sde-100/{threat}"]["average"] for threat in ("sweep", "grey"))
    assert grey < weak and found["strongest"]["sde-100"]["average"] <= grey
    assert found["sweep"]["steps"] < found["budget"]["steps"]
    for part in ("budget", "sweep"):
        assert all(found[part][k] < digits[part][k] for k in ("steps", "eot"))
    shown = {f.name.split("_")[0] for f in (ROOT / "figures/fashion-mnist").glob("*.png")}
    assert shown == {"kd", "dd", "rd", "diff", "dp"}


def test_what_the_readme_says_about_the_unfinished_run_is_what_was_measured():
    runs = [json.loads(f.read_text()) for f in sorted((ROOT / "data/fashion-mnist-gpu/audit").glob("rows-s*.json"))]
    digits = json.loads((ROOT / "data/digits/metrics/dp-s0.json").read_text())
    assert len(runs) == 3 and {run["eps"] for run in runs} == {0.05}
    for run in runs:
        assert run["full"] == digits["budget"] and run["sweep"] | {"eot": 4} == digits["sweep"]
        assert run["threats"]["sde-100/sweep"]["n"] == 64 and run["threats"]["clean-1/many"]["n"] == 256

    def differ(a: str, b: str, what: str, many: bool = False) -> list[float]:
        each = [run["threats"] if many else run["strongest"] for run in runs]
        names = [f"{name}/many" if many else name for name in (a, b)]
        return [round(v, 1) for v in mean_interval([100 * (of[names[0]][what] - of[names[1]][what]) for of in each])]

    assert differ("sde-100", "clean-1", "average") == [3.7, 2.6, 4.9]
    assert differ("sde-100", "clean-2", "average") == [3.0, 0.2, 5.9]
    assert differ("adaptive-1", "clean-1", "average", many=True) == [5.2, 3.8, 6.5]
    assert differ("adaptive-2", "clean-2", "average", many=True) == [4.3, 1.8, 6.9]
    assert differ("adaptive-1", "sde-100", "worst") == [8.3, 0.3, 16.4]
    assert differ("adaptive-2", "sde-100", "worst") == [6.8, 0.8, 12.7]
    assert differ("adaptive-1", "sde-100", "average") == [1.6, -4.7, 7.8]
    assert differ("adaptive-2", "sde-100", "average") == [1.4, -4.6, 7.4]
