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
from lib.models import build_classifier
from lib.pipeline.profile import compose_profile
from lib.report import captions, claim_results, claims, figures
from lib.report.claim_schema import CLAIMS, load_claims
from lib.report.claim_verdicts import NOT_MEASURED
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
    for module in (artifacts, captions, claims, claim_results):
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
    assert '"ms"' not in (tmp_path / "data/p/records/kd-s0.json").read_text()  # timings are no metrics
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
    assert names["shown"] == {}
    assert [path.name for path in (tmp_path / "figures").rglob("*.*")] == ["captions.md"]  # without a figure in it
    assert "![" not in (tmp_path / "figures/p/captions.md").read_text()
    rows = claims.load_results(profile)
    assert len(rows) == len(load_claims()) and {row["verdict"] for row in rows} == {NOT_MEASURED}
    assert (tmp_path / "data/p/plots/kd_gain.csv").read_text() == "labels,target,accuracy\n"


def test_the_teachers_diagnosis_has_no_red_flag():
    measured = {f.name: json.loads(f.read_text()) for f in (ROOT / "data/digits/audit").glob("diagnosis-s*.json")}
    assert measured.keys() == {"diagnosis-s0.json", "diagnosis-s1.json", "diagnosis-s2.json"}
    for table in measured.values():
        assert table["teacher"] == "sde-100" and table["n_diagnosed"] == 40
        assert table["red"] == sum(table["flag"]) == 0 and len(table["check"]) == len(CHECKS)


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
