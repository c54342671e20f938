"""`evaluate` on what visitors bring: torchvision's way, RobustBench's, a purified classifier, masked gradients."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lib.commands.measures import REPORTED
from lib.utils.files import ROOT

EPS = 0.05
MODELS = """
import torch
from torch import nn

from lib.pretrained import load_classifier
from lib.purify import PurifiedClassifier
from tests.controls import quantised_input, scaled_logits


class Brightest(nn.Module):
    '''The channel that is brightest, after a normalisation as torchvision's models have it; class 3 is never right.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.45))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.2))

    def forward(self, x):
        channels = ((x - self.mean) / self.std).mean((2, 3))
        return torch.cat([channels, torch.full((len(x), 1), -5.0)], 1)


class Noise(nn.Module):
    evaluations = 2

    def forward(self, x, randn_like=None):
        return x + 0.05 * (randn_like or torch.randn_like)(x)


brightest = Brightest
purified = lambda: PurifiedClassifier(Noise(), load_classifier("digits/natural"))
fixed = lambda: PurifiedClassifier(Noise(), load_classifier("digits/natural"), fixed=0)
scaled = lambda: scaled_logits(load_classifier("digits/natural"))
quantised = lambda: quantised_input(load_classifier("digits/natural"))
"""
ZOO = """
from kinds import Brightest

received = []


def load_model(model_name, dataset="cifar10", threat_model="Linf"):
    received.append((model_name, dataset, threat_model))
    return {"Known2024": Brightest}[model_name]()
"""


@pytest.fixture
def kinds(own, monkeypatch):
    """A visitor's folder with models in `kinds.py`, a package robustbench, and images with known margins."""
    (own / "kinds.py").write_text(MODELS)
    (own / "robustbench").mkdir()
    (own / "robustbench" / "__init__.py").write_text("")
    (own / "robustbench" / "utils.py").write_text(ZOO)
    for module in ("kinds", "robustbench", "robustbench.utils"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    rng = np.random.default_rng(0)
    x = rng.uniform(0.4, 0.6, (40, 3, 6, 6)).astype(np.float32)
    y = rng.integers(0, 3, 40)
    x[np.arange(40), y] += rng.uniform(-0.02, 0.15, (40, 1, 1)).astype(np.float32)
    np.savez(own / "colours.npz", x=x, y=y)
    means = x.mean((2, 3))
    own_channel = means[np.arange(40), y]
    means[np.arange(40), y] = -1
    yield own, own_channel - means.max(1)
    for module in ("kinds", "robustbench", "robustbench.utils"):
        sys.modules.pop(module, None)


def evaluated(call, own, *arguments):
    """Exit status and record of an evaluation."""
    code, _, said = call("evaluate", *arguments, "--json", own / "out.json")
    assert (own / "out.json").exists(), said
    return code, json.loads((own / "out.json").read_text())


@pytest.mark.parametrize("name", ["kinds:brightest", "robustbench:Known2024"])
def test_what_is_left_of_a_model_of_known_margins(call, kinds, name):
    own, margin = kinds
    code, result = evaluated(call, own, name, "--data", "colours.npz", "--eps", str(EPS), "--images", "99")
    clean, robust = (margin > 0).mean(), (margin > 2 * EPS).mean()  # one channel falls by eps, another one rises
    assert 0.1 < robust < clean < 1
    assert code == 0 and result["red"] == [] and result["n"] == 40 and not result["random"] and result["draws"] == 1
    assert result["measures"]["clean"]["value"] == pytest.approx(clean)
    assert result["measures"]["robust"]["value"] == pytest.approx(robust)
    assert result["clean_acc"] == f"{100 * clean:.2f}" and result["autoattack_acc"] == f"{100 * robust:.2f}"
    if name.startswith("robustbench"):
        assert sys.modules["robustbench.utils"].received == [("Known2024", "cifar10", "Linf")]


def test_robustbench_is_asked_for_data_set_and_ball_and_may_not_know_a_name(call, kinds):
    own, _ = kinds
    ball = ("--data", "colours.npz", "--eps", "0.5", "--norm", "L2", "--images", "4")
    assert evaluated(call, own, "robustbench:imagenet/Known2024", *ball)[1]["norm"] == "L2"
    assert sys.modules["robustbench.utils"].received == [("Known2024", "imagenet", "L2")]
    code, _, said = call("evaluate", "robustbench:Absent2024", *ball)
    assert code == 1 and said.endswith("expected a model of robustbench for cifar10 and L2, got none: 'Absent2024'")


def test_a_record_has_robustbench_s_fields_and_what_a_random_defence_is_judged_by(call, kinds):
    own, _ = kinds
    ball = ("--data", "digits", "--eps", "0.1", "--images", "8")
    code, result = evaluated(call, own, "kinds:purified", *ball)
    assert code == 0 and result["random"] and result["draws"] == 10 and result["number_forward_passes"] == 2
    fields = {"name", "dataset", "eps", "clean_acc", "number_forward_passes"}  # of RobustBench, those that are measured
    fields |= {
        "norm",
        "n",
        "draws",
        "seed",
        "protocol",
        "measures",
        "attacks",
        "red",
        "gradients_per_image",
        "outcomes",
    }
    assert fields | {"commit", "command", "torch", "python", "device", "source", "pictures"} <= result.keys()
    assert all(row.keys() == {"value", "low", "high"} for row in result["measures"].values())
    assert result["measures"].keys() == REPORTED.keys() and {"control", "worst_of_10"} <= result["measures"].keys()
    assert "g(x + δ)" in result["pictures"][0]["images"] and "bpda" in result["attacks"]
    _, fixed = evaluated(call, own, "kinds:fixed", *ball)  # whose noise the visitor fixed: it stays so
    assert not fixed["random"] and fixed["protocol"]["attacks"] == "autoattack" and "autoattack_acc" in fixed


@pytest.mark.parametrize("name", ["scaled", "quantised"])
def test_masked_gradients_are_red_marks_and_red_checks(call, kinds, name):
    own, _ = kinds
    ball = ("--data", "digits", "--eps", "0.1", "--images", "16", "--checks")
    code, result = evaluated(call, own, f"kinds:{name}", *ball)
    assert code == 3 and any("got no gradient on" in text and "BPDA or square" in text for text in result["red"])
    red = {row["check"] for row in result["checks"] if row["flag"]}
    assert {"zero gradients", *(["logit margin, median"] if name == "scaled" else [])} <= red
    assert result["protocol"]["checked_images"] == 16


@pytest.mark.kills
@pytest.mark.parametrize("name", ["digits/natural", "purified"])
def test_an_evaluation_that_is_killed_goes_on_and_ends_equal_to_the_bit(tmp_path, name):
    model = ("digits/natural", *(("--purifier", "digits/adaptive-1") if name == "purified" else ()))
    command = [sys.executable, "-m", "lib", "evaluate", *model, "--data", "digits", "--eps", "0.1", "--images", "32"]
    command += ["--batch-size", "8", "--effort", "quick"]

    def start(run):
        files = ("--json", tmp_path / f"{run}.json", "--adversarial", tmp_path / f"{run}.npz")
        options = [*map(str, ("--resume", tmp_path / run, *files))]
        return subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def saved(run):
        return len(list((tmp_path / run).glob("*.pt")))

    calm = start("calm")
    while not saved("calm"):
        time.sleep(0.02)
    began = time.monotonic()
    assert calm.wait() == 0
    span, rng, before = time.monotonic() - began, random.Random(name), []
    for _ in range(3):
        process = start("killed")
        while saved("killed") <= max(before, default=0) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, span / 3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        before.append(saved("killed"))
    assert start("killed").wait() == 0 and before and before == sorted(before)
    texts = [json.loads((tmp_path / f"{run}.json").read_text()) for run in ("calm", "killed")]
    for text in texts:
        del text["seconds"], text["command"], text["commit"]  # a commit may come in between
    assert texts[0] == texts[1]
    with np.load(tmp_path / "calm.npz") as one, np.load(tmp_path / "killed.npz") as other:
        assert all(np.array_equal(one[k], other[k]) for k in one.files if k != "command")
