"""Trainings of the few-step networks go on where they were killed, whatever is broken of what is there."""

import json
from functools import partial

import pytest
import torch

from lib import training
from lib.data import load_dataset
from lib.diffusion.network import build_unet, load_network, save_network
from lib.distillation.few_step_training import has_network, train_consistency, train_diffusion_model, train_once
from lib.experiments.diffpure_students import restore_classifiers
from lib.experiments.diffusion_distillation import few_step_work_dir
from lib.models import build_classifier
from tests.recipes import small_recipe

TINY = small_recipe(batch_size=64, first=8, levels=(2, 4), t_max=120, teacher_epochs=3, cd_epochs=3)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", n_labels=64)


@pytest.mark.parametrize("kind", ["teacher", "cd"])
def test_fault_05_killed_trainings_of_this_project_go_on(kind, data, tmp_path, monkeypatch):
    """What decides them, a teacher in closures and images of the validation, is hashed alike in the next call."""

    def run(checkpoint=None):
        if kind == "teacher":
            return train_diffusion_model(data, TINY, 0, "teacher", checkpoint)
        return train_consistency(build_unet(1, 8, TINY.channels, seed=3), data, TINY, 0, checkpoint)

    epochs, real, save = [], training._run_epoch, training.save_state
    whole, history = run()
    monkeypatch.setattr(training, "_run_epoch", lambda state, *rest: epochs.append(state.epoch) or real(state, *rest))
    monkeypatch.setattr(training, "save_state", lambda *rest: (save(*rest), (_ for _ in ()).throw(Killed)))
    with pytest.raises(Killed):
        run(tmp_path / "a.pt")
    monkeypatch.setattr(training, "save_state", save)
    again, rows = run(tmp_path / "a.pt")
    assert epochs == [0, 1, 2] and rows == history
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("damage", ["flip", "cut", "history", "no weights", "no card"])
def test_fault_43_a_broken_network_is_set_aside_and_trained_again(damage, tmp_path, capsys):
    folder, calls = tmp_path / "pd-1", []

    def train_network():
        calls.append(1)
        return build_unet(1, 8, (8, 8), seed=0), [{"epoch": 0}]

    train = partial(train_once, folder, train_network)
    assert train() == train() == [{"epoch": 0}] and len(calls) == 1
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flip":
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:100])
    elif damage == "history":
        (folder / "facts.json").write_text(json.dumps({"history": []}))
    elif damage == "no weights":
        weights.unlink()
    else:
        (folder / "card.json").unlink()
    assert train() == [{"epoch": 0}] and len(calls) == 2 and has_network(folder)
    assert f"{folder} was renamed to pd-1.broken, since " in capsys.readouterr().err
    load_network(folder)


def test_fault_43_a_broken_classifier_is_set_aside(tmp_path, capsys):
    first, second = (build_classifier("cnn", width=4, seed=s) for s in (0, 1))
    restore_classifiers(tmp_path, {"natural": first})
    restore_classifiers(tmp_path, {"natural": second})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    file = tmp_path / "evaluations" / "classifier natural.pt"
    file.write_bytes(file.read_bytes()[:-40])
    third = build_classifier("cnn", width=4, seed=2)
    restore_classifiers(tmp_path, {"natural": third})
    assert "classifier natural.pt.broken" in capsys.readouterr().err and file.exists()
    assert not torch.equal(third[1].weight, first[1].weight)


def test_fault_05_folders_of_unfinished_networks_belong_to_the_images_not_to_their_number(data):
    other = load_dataset("digits", n_labels=64, seed=1)
    assert len(other.train.y) == len(data.train.y)
    again = load_dataset("digits", n_labels=64)
    places = [few_step_work_dir("digits", TINY, 0, each) for each in (data, again, other)]
    assert places[0] == places[1] != places[2]


def test_a_network_beside_another_recipe_is_none(tmp_path):
    save_network(build_unet(1, 8, (8, 8), seed=0), tmp_path / "a", {})
    assert has_network(tmp_path / "a") and not has_network(tmp_path / "b")
