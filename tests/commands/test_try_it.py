"""Sliders of notebooks 01 to 05 draw at once, and anew when one is moved."""

import matplotlib.pyplot as plt
import pytest
import torch

from lib.commands import try_it
from lib.data import load_dataset
from lib.experiments.samples import evaluation_images
from lib.pretrained import load_classifier, pretrained_folder

MODELS = pretrained_folder("digits/diffusion")


class Scaled(torch.nn.Module):
    """A network whose logits are `factor` times as large: what distillation at that temperature makes of it."""

    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.factor * self.net(x)


@pytest.fixture(scope="module")
def points():
    return evaluation_images(load_dataset("digits"), 8, 0)[0]


@pytest.fixture(scope="module")
def networks():
    return {name: load_classifier(f"digits/{name}") for name in ("natural", "trades")}


def check_redrawn(box, moves):
    """Each move changes the picture; returns the lines of text."""
    *controls, text, picture = box.children
    seen, lines = [bytes(picture.value)], [text.value]
    assert seen[0].startswith(b"\x89PNG")
    for number, value in moves:
        controls[number].value = value
        assert bytes(picture.value) not in seen
        seen.append(bytes(picture.value))
        lines.append(text.value)
    assert not plt.get_fignums()
    return lines


def test_a_higher_temperature_softens_the_labels(points, networks):
    box = try_it.explore_temperature(networks["natural"], networks["trades"], points, 1.0)
    lines = check_redrawn(box, [(0, 4.0), (0, 100.0), (1, 3)])
    bits = [float(line.split(" bits")[0].split()[-1]) for line in lines]
    assert bits[0] < bits[1] < bits[2] < 3.33  # log2 of ten classes


def test_an_attack_along_a_gradient_that_underflows_stands_still(points, networks):
    models = {"1": networks["natural"], "1000": Scaled(networks["natural"], 1000.0).eval()}
    box = try_it.explore_masking(models, {"1": 1.0, "1000": 1000.0}, points, 0.2, 5)
    lines = check_redrawn(box, [(0, "1"), (1, 0.1), (3, 2)])
    assert lines[0].endswith("in float32: 0") and not lines[1].endswith("in float32: 0")


def test_each_student_is_attacked_for_itself(points, networks):
    box = try_it.explore_students(networks, points, 0.1, 5)
    lines = check_redrawn(box, [(2, 0.3), (3, 20), (4, 1), (1, "natural")])
    assert all("natural answers" in line for line in lines) and "trades" not in lines[-1]


def test_more_noise_hides_the_image(points, networks):
    box = try_it.explore_reverse(MODELS, networks["natural"], points, "adaptive-1")
    lines = check_redrawn(box, [(0, 10.0), (1, 1), (2, 2), (3, 1)])
    levels = [float(line.split(";")[0].split("= ")[1]) for line in lines]
    assert levels[0] > levels[1]


def test_a_claim_that_is_none_is_refused():
    with pytest.raises(KeyError, match=r"kd\.none"):
        try_it.abstract_verdicts("kd.none")
