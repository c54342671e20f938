"""An evaluation goes on from files that are of the same model, data, attack and code, and whole."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lib.evaluation import adversarial_images
from lib.evaluation.robust_accuracy import robust_accuracy
from lib.utils.content_hash import content_hash

X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 2
CELL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self._sign = nn.Linear(16, 2), 1.0
        self.body.weight.data = torch.arange(32.0).sin().reshape(2, 16)
        self.body.bias.data.zero_()
    def forward(self, x):
        return self._sign * self.body(x.flatten(1))
"""


def net(source: str = CELL) -> nn.Module:
    """Runs a notebook's cell and returns its network."""
    cell = {"__name__": "__main__"}
    exec(source, cell)
    return cell["Net"]().eval()


def run(model, folder=None, attacks=("fgsm",), eps=0.1):
    """Evaluates a model on eight images, labelled as the first network does."""
    y = net()(X).argmax(1)
    record = robust_accuracy(model, list(attacks), X, y, eps=eps, batch_size=4, resume_dir=folder, progress=False)
    return {k: v for k, v in record.items() if k != "timing"}


@pytest.mark.parametrize(
    "other",
    [
        lambda: net(CELL.replace("self._sign * self.body", "-1 * self.body")),
        lambda: setattr(model := net(), "_sign", -1.0) or model,
        lambda: (model := net()).register_forward_hook(lambda module, inputs, z: -z) and model,
        lambda: setattr(model := net(), "forward", lambda x: -model.body(x.flatten(1))) or model,
    ],
    ids=["forward", "private", "hook", "instance"],
)
def test_fault_04_another_model_gets_its_own_result(other, tmp_path):
    first, alone = run(net(), tmp_path), run(other())
    assert run(other(), tmp_path) == alone and alone["clean"]["accuracy"] == 0 < first["clean"]["accuracy"]
    assert run(net(), tmp_path) == first


def test_fault_04_attack_images_of_an_edited_model_are_its_own(tmp_path):
    """Clean answers are equal, so that the file of the first model would be taken."""
    kinked = CELL.replace("return self._sign *", "x = x + 0.5 * (x - x.detach()) * (2 * (x < 0.5) - 3)\n        return")
    assert torch.equal(net()(X), net(kinked)(X))
    first, alone = run(net(), tmp_path, eps=0.5), run(net(kinked), eps=0.5)
    assert run(net(kinked), tmp_path, eps=0.5) == alone
    assert alone["robust"]["accuracy"] > first["robust"]["accuracy"]  # half of its gradient has the wrong sign


def test_fault_25_modules_and_text_in_a_model(tmp_path):
    model, names = net(), np.array(["cat", "dog"])
    model.names = names
    for each in (model, lambda x: np.negative(1) * -model(x) * len(names) / 2):
        first = run(each, tmp_path)
        assert run(each, tmp_path) == first == run(each) and first["model"]


def test_what_cannot_be_hashed_is_evaluated_and_only_not_resumed(tmp_path):
    model = net()
    model.lock = threading.Lock()
    assert run(model)["model"] is None
    with pytest.raises(TypeError, match=r"got a lock as evaluation.model.lock, whose state cannot be hashed: .*"):
        run(model, tmp_path)


def test_fault_43_a_broken_file_of_an_evaluation_is_set_aside_and_its_batch_run_again(tmp_path, capsys, monkeypatch):
    whole, rng = run(net(), tmp_path), random.Random(0)
    file = min(tmp_path.iterdir())
    content, calls, real = file.read_bytes(), [], adversarial_images.attack
    monkeypatch.setattr(adversarial_images, "attack", lambda *a, **k: calls.append(1) or real(*a, **k))
    flips = []
    for _ in range(60):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        flips.append(bytes(changed))
    for bad in (*flips, b"", content[:-1], content[:100], b"text"):
        file.write_bytes(bad)
        calls.clear()
        assert run(net(), tmp_path) == whole and len(calls) == 1
        assert f"{file} was renamed to {file.name}.broken" in capsys.readouterr().err


def test_a_model_is_hashed_once_for_all_attacks(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        adversarial_images, "content_hash", lambda value, *rest: hashed.append(value) or content_hash(value, *rest)
    )
    run(net(), tmp_path, ["noise", "fgsm", "pgd"])
    assert sum(isinstance(value, dict) and "model" in value for value in hashed) == 1 and len(hashed) == 4
