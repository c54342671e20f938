"""Results on disk, intervals, and what the committed claims are; the README's table is generated."""

import json
import math
import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
import yaml
from scipy import stats as scipy_stats

from lib.evaluation.sanity_checks import CHECKS
from lib.experiments.diffpure import claimed_students
from lib.models import build_classifier
from lib.pipeline.profile import compose_profile
from lib.report import claims, figures
from lib.report.claim_schema import CLAIMS, load_claims
from lib.report.claim_verdicts import EQUIVALENT, INCONCLUSIVE, NO_MARGIN, NOT_MEASURED, SUPPORTED
from lib.utils import artifacts
from lib.utils.files import ROOT, to_jsonable
from lib.utils.intervals import clopper_pearson, mean_interval, wilson


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
    for module in (artifacts, claims):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return "p"


def test_results_are_canonical_and_complete(profile, tmp_path):
    metrics = {"b": torch.tensor(0.5), "a": {"x": np.float32(1), "bad": math.nan}, "n": 3}
    record = artifacts.save_record(profile, "kd", 0, metrics=metrics, arrays={"m": torch.eye(2)}, timing={"ms": 1.5})
    text = (tmp_path / "data/p/metrics/kd-s0.json").read_text()
    assert json.loads(text) == {"a": {"bad": None, "x": 1.0}, "b": 0.5, "n": 3} and text.index('"a"') < text.index(
        '"b"'
    )
    assert artifacts.load_records(profile, "kd", [0]) == [record]
    assert json.loads((tmp_path / "data/p/timing/kd-s0.json").read_text()) == {"ms": 1.5}
    assert "ms" not in (tmp_path / "data/p/records/kd-s0.json").read_text()  # timings are no metrics
    with pytest.raises(FileNotFoundError, match=r"records/kd-s4.json is missing: run `dvc repro kd@p-4`"):
        artifacts.load_records(profile, "kd", [0, 4])


def test_models_are_saved_as_safetensors(profile, tmp_path):
    model = build_classifier("cnn", width=4, seed=3)
    artifacts.save_model(model, profile, "m")
    other = artifacts.load_model(build_classifier("cnn", width=4, seed=4), profile, "m")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert [f.name for f in (tmp_path / "data/p/models").iterdir()] == ["m.safetensors"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        artifacts.load_model(model, profile, "nothing")


@pytest.mark.parametrize("profile", ["digits"])  # Fashion-MNIST's results are of an earlier protocol
def test_every_claim_is_found_in_the_records_of_every_profile(profile):
    """Claims may be left to some profiles, but not in digits, which measures all: their paths are right, too."""
    results = claims.evaluate_claims(claims.saved_records(profile), load_claims(), profile)
    assert profile != "digits" or all(result["value"] is not None for result in results)
    words = ("statement", "expected", "published")
    numbers = [{k: v for k, v in r.items() if k not in words} for r in results]
    committed = [{k: v for k, v in r.items() if k not in words} for r in claims.load_results(profile)]
    assert to_jsonable(numbers) == committed


@pytest.mark.parametrize("profile", ["digits", "smoke", "mnist", "fashion-mnist", "fashion-mnist-gpu", "cifar10"])
def test_claims_are_left_out_where_the_profiles_settings_leave_them_out(profile):
    p = compose_profile(profile)
    leaves_out = {f"kd.gain_{n}": n not in p["kd"]["label_counts"] for n in (100, 200)}
    leaves_out |= {
        "kd.soft_100": 100 not in p["kd"]["label_counts"],
        "rd.kd_natural": "natural" not in p["rd"]["teachers"],
    }
    leaves_out |= dict.fromkeys(("rd.few_labels", "rd.few_labels_soft"), p["rd"]["few_labels"] == 0)
    leaves_out["dp.noskip"] = "noskip-clean" not in p["dp"]["variants"]
    leaves_out["dp.match_sde"] = not {"match-ode", "match-sde"} <= set(p["dp"]["variants"])
    leaves_out["dp.no_red_flag"] = p["dp"]["diagnosed"] == 0
    leaves_out["dp.undistilled_constraint"] = "undistilled-adaptive" not in p["dp"]["attacked"]
    assert {"label", "label-n0"} <= set(p["dp"]["attacked"]) and p["dp"]["steps"] == 2
    limited = {c.id: profile not in c.profiles for c in load_claims() if c.profiles}
    assert limited == leaves_out
    assert claims.dataset_of(profile) == p["data"]["dataset"]


def test_the_report_is_decided_anew_when_a_claim_changes():
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]
    assert CLAIMS.relative_to(ROOT).as_posix() in stage["deps"]


def test_the_readme_shows_the_committed_claims():
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]
    assert claims.replace_between_marks(readme, "claims", claims.claims_table(rows)) == readme
    assert [r["id"] for r in rows] == [c.id for c in load_claims()]


def test_the_report_leaves_out_experiments_without_seeds(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / claims.SPEED).write_text("{}")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/p.yaml").write_text("data: {dataset: digits}")
    cells = [c for c in nbformat.read(ROOT / "notebooks/06_report.ipynb", 4).cells if c.cell_type == "code"]
    names: dict = {}
    exec(cells[0].source, names)
    names |= {name: [] for name in names if name.endswith("_seeds")} | {"profile": profile, "write": True}
    for cell in cells[1:]:
        exec(cell.source, names)
    assert names["shown"] == {} and not (tmp_path / "figures").exists()
    rows = claims.load_results(profile)
    assert len(rows) == len(load_claims()) and {row["verdict"] for row in rows} == {NOT_MEASURED}
    assert (tmp_path / "data/p/plots/kd_gain.csv").read_text() == "labels,target,accuracy\n"


def test_what_the_readme_says_about_experiment_5_is_what_was_measured():
    measured = [json.loads(p.read_text()) for p in sorted((ROOT / "data/digits/metrics").glob("dp-s*.json"))]
    rows = {r["id"]: r for r in json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]}
    assert (
        len(measured) == 3
        and {m["n_test"] for m in measured} == {32}
        and {m["budget"]["draws"] for m in measured} == {10}
    )
    behind = []
    for metrics in measured:
        summary = metrics["summary"]
        assert summary["inherited_clean_one_minus_teacher"] > 0 and summary["match_sde_minus_ode_to_denoiser"] < 0
        assert summary["inherited_noskip_minus_skip"] > 0 > summary["noskip_minus_skip_average"]
        assert summary["grey_adaptive_minus_clean"] > 0 < summary["adaptive_few_minus_teacher_average"]
        assert summary["adaptive_one_minus_teacher_average"] > 0
        less = [
            line
            for line in metrics["weak_attack_warnings"]
            if line.startswith("sde-100: sweep") and "images for" in line
        ]
        own, transferred = metrics["threats"]["sde-100/sweep"]["average"], metrics["strongest"]["sde-100"]["average"]
        assert less and own > transferred
        behind.append(100 * (own - transferred))
    assert round(max(behind), 1) == 3.1
    assert all(set(m["red"]) == set(claimed_students(2)) and not any(m["red"].values()) for m in measured)
    held = {name for name, row in rows.items() if row["verdict"] in (SUPPORTED, EQUIVALENT)}
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
    worst = {name: np.mean([m["strongest"][name]["worst"] for m in measured]) for name in measured[0]["strongest"]}
    assert max(worst.values()) <= worst["none-0"] + 1e-9


def test_what_the_readme_says_about_the_teachers_diagnosis_is_what_was_measured():
    measured = {f.name: json.loads(f.read_text()) for f in (ROOT / "data/digits/audit").glob("diagnosis-s*.json")}
    assert measured.keys() == {"diagnosis-s0.json", "diagnosis-s1.json", "diagnosis-s2.json"}
    for table in measured.values():
        assert table["teacher"] == "sde-100" and table["n_diagnosed"] == 40
        assert table["red"] == sum(table["flag"]) == 0 and len(table["check"]) == len(CHECKS)


def test_what_the_readme_says_about_experiments_2_and_3_is_what_was_measured():
    rows = {r["id"]: r for r in json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]}
    low, high = rows["dd.kd_student"]["ci95"]
    assert low < 0 < high and rows["dd.kd_student"]["n_images"] == 500
    low, high = rows["rd.gain_trades"]["ci95"]
    assert low < 0 < high
    gain = rows["rd.gain_pgd_at"]
    assert [round(v, 1) for v in (gain["value"], *gain["ci95"])] == [10.0, 5.0, 15.0]
    assert rows["rd.published"]["ci95"][1] < 0 < rows["rd.few_labels"]["ci95"][0]
    low, high = rows["rd.few_labels_soft"]["ci95"]
    assert low < 0 < high
    assert yaml.safe_load((ROOT / "params.yaml").read_text())["rd"]["epochs"] == 16


@pytest.mark.parametrize(
    "claim, digits, times",
    [
        ("kd.gain_100", 1, 1),
        ("dd.kd_student", 1, 1),
        ("rd.gain_pgd_at", 1, 1),
        ("rd.gain_trades", 1, 1),
        ("dp.constraint_grey", 1, 1),
        ("dp.adaptive_few_worst", 1, 2),
        ("dp.noskip", 2, 1),
    ],
)
def test_an_interval_in_the_readmes_prose_is_the_committed_one(claim, digits, times):
    rows = {r["id"]: r for r in json.loads((ROOT / "data/digits/metrics/claims.json").read_text())["claims"]}
    low, high = (f"{end:.{digits}f}".replace("-", "−") for end in rows[claim]["ci95"])
    prose = " ".join((ROOT / "README.md").read_text().split("<!-- claims")[0].split())
    assert prose.count(f"[{low}, {high}]") == times


def test_what_the_readme_says_about_a_second_machine_is_what_was_measured():
    files = "metrics/claims.json", "audit/claims-second-machine.json"
    here, there = (json.loads((ROOT / "data/digits" / f).read_text())["claims"] for f in files)
    assert [row["id"] for row in here] == [row["id"] for row in there]
    sides = [[(row["ci95"][0] > 0) - (row["ci95"][1] < 0) for row in rows] for rows in (here, there)]
    assert [a["id"] for a, x, y in zip(here, *sides) if x != y] == ["rd.gain_trades"]  # refuted there, open here
    moved = {a["id"]: (a["value"], *a["ci95"], b["value"], *b["ci95"]) for a, b in zip(here, there, strict=True)}
    assert sum(both[:3] != both[3:] for both in moved.values()) > len(moved) / 3  # another machine, not a copy
    assert [round(v, 1) for v in moved["rd.gain_trades"]] == [1.2, -2.0, 4.4, -1.2, -2.2, -0.2]
    for name in ("rd.gain_pgd_at", "rd.kd_robust", "rd.few_labels"):
        assert all(row["ci95"][0] > 0 for rows in (here, there) for row in rows if row["id"] == name)
    assert all(row["ci95"][1] < 0 for rows in (here, there) for row in rows if row["id"] == "rd.published")


def test_what_the_readme_says_about_experiment_4_is_what_was_measured():
    measured = [json.loads(p.read_text()) for p in sorted((ROOT / "data/digits/metrics").glob("diff-s*.json"))]
    assert len(measured) >= 3
    for metrics in measured:
        distance = {sampler: row["distance"] for sampler, row in metrics["sweep"].items()}
        assert distance["cd-1"] < distance["ddim-2"] and distance["cd-1"] < distance["pd-1"]
        assert all(distance[f"pd-{n}"] < distance[f"ddim-{n}"] for n in (1, 2, 4))
        assert distance["pd-8"] > distance["ddim-8"] and distance["cd-1"] < distance["cd-2"] < distance["cd-4"]
        assert metrics["cost"]["cd_equals_pd"] < 1


def test_what_the_readme_says_about_fashion_mnist_with_one_seed_is_what_was_measured():
    data = ROOT / "data"
    rows = json.loads((data / "fashion-mnist/metrics/claims.json").read_text())["claims"]
    assert {row["verdict"] for row in rows} == {INCONCLUSIVE, NO_MARGIN, NOT_MEASURED}  # one seed decides nothing
    assert {row["n_seeds"] for row in rows} <= {0, 1}
    measured, digits = (json.loads((data / f"{p}/metrics/dp-s0.json").read_text()) for p in ("fashion-mnist", "digits"))
    assert measured["red"] == {} and measured["n_test"] == measured["threats"]["sde-100/sweep"]["n"] == 64
    assert measured["threats"]["adaptive-2/many"]["n"] == 256
    weak, grey = (measured["threats"][f"sde-100/{threat}"]["average"] for threat in ("sweep", "grey"))
    assert grey < weak and measured["strongest"]["sde-100"]["average"] <= grey
    assert measured["sweep"]["steps"] < measured["budget"]["steps"]
    for part in ("budget", "sweep"):
        assert all(measured[part][k] < digits[part][k] for k in ("steps", "eot"))
    records = {f.name.split("-")[0] for f in (data / "fashion-mnist/records").glob("*.json")}
    assert records == {"kd", "dd", "rd", "diff", "dp"}


def test_what_the_readme_says_about_fashion_mnist_with_three_seeds_is_what_was_measured():
    data = ROOT / "data/fashion-mnist-gpu/metrics"
    measured = [json.loads(f.read_text()) for f in sorted(data.glob("dp-s*.json"))]
    rows = {r["id"]: r for r in json.loads((data / "claims.json").read_text())["claims"]}
    digits = json.loads((ROOT / "data/digits/metrics/dp-s0.json").read_text())
    assert len(measured) == 3 and {m["eps"] for m in measured} == {0.05}
    for m in measured:
        assert m["budget"] == digits["budget"] and m["sweep"] | {"eot": 4} == digits["sweep"]
        assert m["n_test"] == m["threats"]["sde-100/sweep"]["n"] == 64 and m["threats"]["clean-1/many"]["n"] == 256
        assert set(m["red"]) == set(claimed_students(2)) and not any(m["red"].values()) and m["n_diagnosed"] == 40
        worst = {name: left["worst"] for name, left in m["strongest"].items()}
        assert min(left for name, left in worst.items() if name != "none-0") > worst["none-0"]
    clean = [100 * np.mean([m["strongest"][name]["clean"] for m in measured]) for name in measured[0]["strongest"]]
    assert min(clean) >= 83 and max(clean) <= 84
    expected = {
        "clean_one_minus_teacher_average": [-4.1, -4.5, -3.7],
        "clean_few_minus_teacher_average": [-2.9, -3.5, -2.3],
        "clean_one_minus_denoiser": [-3.0, -4.9, -1.0],
        "inherited_clean_one_minus_teacher": [14.0, 13.5, 14.5],
        "inherited_adaptive_one_minus_clean": [-10.5, -14.5, -6.6],
        "adaptive_minus_clean_one_many_average": [5.5, 3.3, 7.6],
        "adaptive_minus_clean_few_many_average": [4.7, 4.3, 5.0],
        "adaptive_few_minus_teacher_worst": [7.3, 1.4, 13.2],
        "adaptive_few_minus_teacher_average": [1.2, -5.0, 7.4],
    }
    for name, numbers in expected.items():
        assert [round(v, 1) for v in mean_interval([100 * m["summary"][name] for m in measured])] == numbers, name
    assert rows["dp.adaptive_few_worst"]["verdict"] == rows["dp.no_red_flag"]["verdict"] == SUPPORTED
    shown = {f.name.split("_")[0] for f in (ROOT / "figures/fashion-mnist-gpu").glob("*.png")}
    assert shown == {"kd", "dd", "diff", "dp"} and not list(data.glob("rd-*"))
    two = [json.loads(f.read_text()) for f in sorted(data.glob("dd-s*.json"))]
    table_values = {
        "dd.no_robustness": [13.7, 6.1, 21.3],
        "dd.no_robustness_large": [0.0, 0.0, 0.0],
        "dd.apparent": [64.7, 60.9, 68.5],
    }
    for name, numbers in table_values.items():
        assert [round(v, 1) for v in (rows[name]["value"], *rows[name]["ci95"])] == numbers, name
    assert [round(v, 2) for v in mean_interval([m["summary"]["cw_l2_ratio"] for m in two])] == [1.28, 1.2, 1.36]
    pairs = [(m["models"]["T100"], m["models"]["T1"]) for m in two]
    assert [round(v, 1) for v in mean_interval([100 * (a["clean"] - b["clean"]) for a, b in pairs])] == [
        -4.7,
        -6.1,
        -3.2,
    ]
    for distilled, _ in pairs:
        assert (distilled["small"]["eps"], distilled["large"]["eps"]) == (0.05, 0.2)
        seeing = [distilled["small"][name] for name in ("fgsm/T", "pgd-ce/T", "pgd-margin", "apgd-dlr", "apgd-t")]
        assert max(seeing) - min(seeing) <= 0.02 + 1e-9 and distilled["large"]["worst"] == 0
    assert len(two) == 3 and {m["n_test"] for m in two} == {100}


def test_no_committed_notebook_names_a_path_of_the_machine_that_ran_it():
    for file in (*ROOT.glob("data/*/runs/*.ipynb"), *ROOT.glob("notebooks/*.ipynb")):
        assert "site-packages" not in file.read_text(), file.name


def test_fault_23_claims_are_read_and_written_in_any_locale():
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "utf-8",
    }
    code = "import sys; sys.argv = ['x', '--readme']; from lib.report import claims; claims.load_claims(); "
    code += "claims.write_text = lambda path, text: None; claims.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0 and "all numbers: data/digits/metrics/" in done.stdout, done.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"claims": 3}', '{"claims": [{"verdict": "an older word"}]}'])
def test_results_that_were_half_written_are_named(profile, tmp_path, content):
    path = tmp_path / "data/p/metrics/claims.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"claims.json, got .*: "):
        claims.load_results(profile)
