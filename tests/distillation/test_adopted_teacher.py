"""Teachers of others: what diffusers' own code saved purifies here and is distilled; what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from lib.data import Split, load_dataset
from lib.diffusion.network import load_network
from lib.distillation.adopted_teacher import adopt_teacher, find_model
from lib.distillation.few_step import load_config
from lib.distillation.few_step_training import train_consistency
from lib.pipeline import adopt
from lib.purify import load_purifier, purify
from tests.recipes import small_recipe

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data():
    digits = load_dataset("digits")
    return replace(digits, train=Split(*(t[:64] for t in digits.train)))


def saved(folder, scheduler=None, **config):
    """A pipeline as diffusers saves it."""
    torch.manual_seed(0)
    net = UNet2DModel(**SMALL | config)
    DDPMPipeline(net, DDPMScheduler(**scheduler or {})).save_pretrained(folder)
    return net.eval()


@pytest.mark.parametrize(("prediction", "target"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_a_pipeline_of_diffusers_purifies_and_is_distilled(tmp_path, data, prediction, target):
    net = saved(tmp_path / "theirs", {"prediction_type": prediction})
    models = tmp_path / "models"
    recipe = adopt_teacher(str(tmp_path / "theirs"), models, data, small_recipe(cd_epochs=1))
    assert (recipe.target, recipe.channels, recipe.attention, recipe.t_max) == (target, (8, 16), True, 999)
    assert load_config(models)[0] == recipe
    own, t = load_network(models / "teacher"), torch.tensor([50])
    assert torch.equal(own(X, t).sample, net(X, t).sample)
    for name in ("sde-4", "ddim-1"):
        y = purify(load_purifier(models, name), X, progress=False)
        assert y.shape == X.shape and y.isfinite().all()
    student, history = train_consistency(own, data, recipe, 0)
    assert len(history) == 1 and not torch.equal(student(X, t).sample, own(X, t).sample)


def test_a_plain_network_predicts_noise(tmp_path, data):
    torch.manual_seed(0)
    UNet2DModel(**SMALL).save_pretrained(tmp_path / "net")
    assert adopt_teacher(str(tmp_path / "net"), tmp_path / "models", data, small_recipe()).target == "epsilon"


@pytest.mark.parametrize(
    ("scheduler", "config", "words"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, {}, "expected beta_schedule 'linear', got 'squaredcos_cap_v2'"),
        ({"prediction_type": "sample"}, {}, "prediction_type"),
        ({}, {"sample_size": 16}, "expected a network of 8 x 8 images for digits, got 16"),
        ({}, {"in_channels": 3, "out_channels": 3}, "expected a network of 1 channels for digits, got 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, data, scheduler, config, words):
    saved(tmp_path / "theirs", scheduler, **config)
    with pytest.raises(ValueError, match=words):
        adopt_teacher(str(tmp_path / "theirs"), tmp_path / "models", data, small_recipe())
    assert not (tmp_path / "models").exists()


def test_names_of_the_hub(tmp_path):
    assert find_model("owner/model", lambda name: Path(name) / "cached") == Path("owner/model/cached")
    for name in ("model", "/absent/folder", "./absent", "a/b/c", "owner/"):
        with pytest.raises(FileNotFoundError, match="expected a folder or a name such as"):
            find_model(name, lambda name: pytest.fail("downloads"))


def test_without_the_hub_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="expected a folder or a model of the hub, got 'nobody/nothing'"
    ) as info:
        find_model("nobody/nothing")
    assert "\n" not in str(info.value)


def test_the_command(tmp_path, capsys):
    saved(tmp_path / "theirs")
    models = tmp_path / "models"
    adopt.main([str(tmp_path / "theirs"), str(models), "--profile", "smoke"])
    assert "predicts epsilon, channels (8, 16)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected a folder without a teacher"):
        adopt.main([str(tmp_path / "theirs"), str(models), "--profile", "smoke"])
