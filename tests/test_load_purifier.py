"""Folders of networks: what was changed, exchanged or comes from elsewhere is honoured or refused by name."""

import json
import shutil

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file, save_file

from lib import purify
from lib.diffusion.network import build_unet, eps_model, load_network, save_network
from lib.evaluation.certify import one_step_denoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"
X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SMALL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "add_attention": False,
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 8,
}


@pytest.fixture
def work(models, tmp_path):
    """A copy of the networks that a test may change."""
    shutil.copytree(models, tmp_path / "work")
    return tmp_path / "work"


def edit(path, **changes):
    """Changes entries of a JSON file; None takes them out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def run(models, name):
    return purify.purify(purify.load_purifier(models, name), X, progress=False)


def foreign_teacher(work, **config):
    """Puts an untrained network as diffusers saves it in the place of the teacher."""
    shutil.rmtree(work / "teacher")
    torch.manual_seed(0)
    UNet2DModel(**SMALL | config).save_pretrained(work / "teacher")


def refused(work, name, *words):
    """Fails unless a purifier is refused in one line that holds the words."""
    with pytest.raises(ValueError, match="expected") as info:
        purify.load_purifier(work, name)
    text = str(info.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_fault_37_changed_files_of_a_network_are_refused_by_name(work):
    expected = run(work, "cd-2")
    shutil.copy(work / "teacher" / WEIGHTS, work / "cd" / WEIGHTS)
    refused(work, "cd-2", f"cd/{WEIGHTS}", "run the stage that trains it again")
    with pytest.raises(ValueError, match="changed or exchanged"):
        one_step_denoiser(work, "cd", 0.17)
    with pytest.raises(ValueError, match="changed or exchanged"):
        load_network(work / "cd")
    for name, file, changes in (
        ("pd-2", "config.json", {"norm_num_groups": 4}),
        ("pd-1", "facts.json", {"history": [1]}),
        ("teacher", "card.json", {"name": "cd"}),
    ):
        edit(work / name / file, **changes)
        refused(work, name if name != "teacher" else "ddim-1", name)
    shutil.rmtree(work / "pd-4")
    shutil.copytree(work / "sampler", work / "pd-4")
    refused(work, "pd-4", "'pd-4'", "'sampler'")
    (work / "cd" / "card.json").unlink()
    refused(work, "cd-2", "card.json")
    assert expected.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "x0"},
        {"target": "epsilon"},
        {"t": True},
        {"t": "99"},
        {"t": "absent"},
        {"t": 98.0},
        {"t": 1000.0},
        {"skip": None},
        {"sigma_data": 0.0},
        {"sigma_data": "absent"},
        {"more": 1},
        {"channels": []},
    ],
)
def test_fault_37_another_recipe_is_refused_by_name(work, changes):
    edit(work / "recipe.json", **changes)
    refused(work, "cd-2", "recipe.json", "stage")


def test_fault_35_37_broken_weights_are_refused(work):
    weights = load_file(work / "teacher" / WEIGHTS)
    shutil.rmtree(work / "pd-2")
    foreign_teacher(work)
    path = work / "teacher" / WEIGHTS
    weights = load_file(path)
    for broken, words in (
        ({k: v * 1e30 for k, v in weights.items()}, "weights are broken"),
        ({k: v * float("nan") for k, v in weights.items()}, "expected finite weights"),
        ({k: v.int() for k, v in weights.items()}, "expected floating-point weights"),
        ({k: v for k, v in weights.items() if k != "conv_in.bias"}, "conv_in.bias"),
        (weights | {"more": torch.zeros(1)}, "unexpected keys"),
        (weights | {"conv_in.bias": torch.zeros(9)}, "conv_in.bias"),
    ):
        save_file(broken, path)
        refused(work, "ddim-1", "teacher", words)
    path.write_bytes(path.read_bytes()[:500])
    refused(work, "ddim-1", WEIGHTS, "cannot be read")
    net = build_unet(1, 8, (8, 8), seed=0)
    net.conv_in.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"expected finite weights, .* conv_in.bias"):
        save_network(net, work / "cd")


def test_fault_29_foreign_teachers_are_honoured_or_refused_with_the_reason(work):
    foreign_teacher(work)
    expected = run(work, "ddim-2")
    for size, stored in ((None, None), ((8, 8), 8)):
        foreign_teacher(work, sample_size=size)
        assert torch.equal(run(work, "ddim-2"), expected)
        assert purify.load_purifier(work, "ddim-2").net.config.sample_size == stored
    for config, words in (
        ({"sample_size": (8, 16)}, "square sample_size"),
        ({"out_channels": 2}, "learned variance"),
        ({"in_channels": 3, "out_channels": 6}, "learned variance"),
        ({"in_channels": 4, "out_channels": 4}, "1 or 3 channels"),
        ({"num_class_embeds": 10}, "class-conditional"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"center_input_sample": True}, "center_input_sample"),
    ):
        foreign_teacher(work, **config)
        refused(work, "ddim-2", "config.json", words)
    shutil.rmtree(work / "cd")
    shutil.copytree(work / "teacher", work / "cd")
    refused(work, "cd-1", "expected card.json")


def test_fault_29_a_pipeline_as_teacher_is_its_unet(work):
    foreign_teacher(work)
    expected = run(work, "ddim-2")
    (work / "teacher").rename(work / "unet")
    (work / "teacher").mkdir()
    (work / "unet").rename(work / "teacher" / "unet")
    (work / "teacher" / "model_index.json").write_text("{}")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(work / "teacher" / "scheduler")
    assert torch.equal(run(work, "ddim-2"), expected)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(work / "teacher" / "scheduler")
    refused(work, "ddim-2", "scheduler_config.json", "beta_schedule")
    with pytest.raises(ValueError, match=r"pipeline of diffusers.*unet"):
        load_network(work / "teacher")


@pytest.mark.parametrize("place", ["teacher", "scheduler", "teacher/scheduler"])
def test_fault_13_a_scheduler_beside_the_network_is_honoured_or_refused(work, place):
    expected = run(work, "ddim-2")  # the recipe's target is v
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(work / place)
    assert torch.equal(run(work, "ddim-2"), expected)
    for options, words in (
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"num_train_timesteps": 250}, "num_train_timesteps"),
        ({"beta_start": 0.001}, "beta_start"),
        ({"beta_end": 0.01}, "beta_end"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"prediction_type": "epsilon"}, "predicts v, got epsilon"),
        ({"variance_type": "learned_range"}, "variance_type"),
    ):
        DDPMScheduler(**{"prediction_type": "v_prediction"} | options).save_pretrained(work / place)
        refused(work, "ddim-2", "scheduler_config.json", words)


def test_fault_13_a_network_predicts_what_its_scheduler_says(work):
    z, net = X.clone(), load_network(work / "teacher")
    expected = eps_model(net, "v")(z, 99)
    assert not torch.equal(eps_model(net)(z, 99), expected)
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(work / "teacher")
    net = load_network(work / "teacher")
    assert torch.equal(eps_model(net)(z, 99), expected)
    with pytest.raises(ValueError, match="expected the target 'v'"):
        eps_model(net, "epsilon")


@pytest.mark.parametrize("name", ["adaptive.30360.part-2", "../cd-2", "/abs-1", "", "cd-²", "cd-02", "cd-41", "pd-3"])
def test_fault_42_a_leftover_or_a_path_is_no_purifier(work, name):
    shutil.copytree(work / "cd", work / "adaptive.30360.part")
    assert purify.purifier_kinds(work) == ["cd", "ddim", "ddpm", "heun", "pd", "sde"]
    refused(work, name)


def test_weights_in_other_precisions_become_float32(work):
    foreign_teacher(work)
    path = work / "teacher" / WEIGHTS
    weights = {k: v.half() for k, v in load_file(path).items()}
    save_file(weights, path)
    net = purify.load_purifier(work, "ddim-1").net
    assert all(torch.equal(v, weights[k].float()) for k, v in net.state_dict().items())
