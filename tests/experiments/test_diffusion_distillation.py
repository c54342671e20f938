"""Experiment 4: training that goes on where it was, measures against closed forms, and costs by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from lib.data import Split, load_dataset
from lib.diffusion.network import build_unet, load_network, save_network
from lib.diffusion.schedule import add_noise
from lib.distillation import few_step, few_step_training
from lib.distillation.few_step import mse, run_sampler
from lib.experiments import diffusion_distillation, diffusion_distillation_metrics
from lib.models import build_classifier
from lib.pipeline import benchmark
from lib.pipeline.profile import compose_profile
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator
from tests.recipes import small_recipe

TINY = small_recipe(batch_size=512, first=8, levels=(2, 4), t_max=120)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A folder with all networks of a tiny recipe, and their histories."""
    work = tmp_path_factory.mktemp("work")
    return work, diffusion_distillation.train_networks(data, TINY, 0, work)


def test_networks_are_saved_as_safetensors_and_loaded_equal(tmp_path):
    net, x = build_unet(1, 8, (8, 8), seed=1).eval(), torch.rand(2, 1, 8, 8)
    for facts in ({"history": [1]}, {}):  # the second replaces the first
        save_network(net, tmp_path / "net", facts)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "card.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "facts.json",
    ]
    assert torch.equal(load_network(tmp_path / "net")(x, 5).sample, net(x, 5).sample)
    save_network(
        load_network(tmp_path / "net"), tmp_path / "again"
    )  # what it began as, and not where that was: equal anywhere
    assert json.loads((tmp_path / "again/config.json").read_text())["_name_or_path"] == "net"
    with pytest.raises(FileNotFoundError, match=r"expected a network in .* run `dvc repro`"):
        load_network(tmp_path / "other")


def weights(folder):
    return {k: v.clone() for k, v in load_network(folder).state_dict().items()}


def test_an_interrupted_run_goes_on_and_ends_in_the_same_networks(trained, data, tmp_path, monkeypatch):
    work, histories = trained
    assert list(histories) == ["teacher", "sampler", "pd-4", "pd-2", "pd-1", "cd"]
    teacher = load_network(work / "teacher")
    for name in ("pd-4", "pd-2"):
        save_network(load_network(work / name), tmp_path / name, {"history": histories[name]})
    names, train = [], few_step_training.train
    monkeypatch.setattr("lib.distillation.progressive.train", lambda *a, **k: names.append(k["name"]) or train(*a, **k))
    again = few_step_training.train_progressive(teacher, data, TINY, 0, tmp_path)
    assert names == ["1 steps"] and again == {n: histories[n] for n in ("pd-4", "pd-2", "pd-1")}
    for name, weight in weights(tmp_path / "pd-1").items():
        assert torch.equal(weight, weights(work / "pd-1")[name]), name
    monkeypatch.setattr(few_step_training, "train", lambda *a, **k: pytest.fail("it was trained before"))
    assert diffusion_distillation.train_networks(data, TINY, 0, work) == histories


def test_every_sampler_begins_at_the_same_noise(trained, data):
    work, _ = trained
    scalings = few_step.scalings_of(data, TINY)
    assert scalings.sigma_data == pytest.approx((2 * data.train.x - 1).std().item())
    samplers = diffusion_distillation.all_samplers(work, TINY, scalings, (100, 8, 4, 2, 1))
    assert {n: sum(k.endswith(f"-{n}") for k in samplers) for n in (100, 8, 4, 2, 1)} == {
        100: 3,
        8: 3,
        4: 4,
        2: 4,
        1: 4,
    }
    assert all(name == f"{name.split('-')[0]}-{n}" for name, (n, _) in samplers.items())
    test = Split(data.test.x[:12], data.test.y[:12])
    classifier = build_classifier("cnn", **data.spec(), width=4, seed=0)
    rows, images = diffusion_distillation_metrics.sampler_metrics(samplers, data, test, classifier, TINY, 0)
    assert rows["ddim-100"]["distance"] == rows["ode-100"]["distance"] == 0 < rows["ddim-1"]["distance"]
    assert rows["images"]["accuracy"] == (classifier(test.x).argmax(1) == test.y).double().mean().item()
    z = add_noise(test.x, TINY.t, randn_like(seeded_generator(0, "sweep")))
    for name in ("sde-100", "cd-2"):
        assert torch.equal(run_sampler(samplers[name][1], z, 0, f"sweep/{name}"), images[name])
        assert not torch.equal(run_sampler(samplers[name][1], z, 1, f"sweep/{name}"), images[name])
    for name in ("ddim-4", "pd-1", "cd-1"):
        assert torch.equal(run_sampler(samplers[name][1], z, 1), images[name])
    expected = {n: mse(images[f"pd-{n}"], images[other]) for n, other in ((4, "ddim-8"), (2, "pd-4"), (1, "pd-2"))}
    assert diffusion_distillation_metrics.progressive_errors(images, TINY) == {
        str(n): {"to_teacher": v} for n, v in expected.items()
    }
    pictures = diffusion_distillation_metrics.sampler_images(samplers, images, test, TINY, 0, count=3)
    assert len(pictures) == 13 and all(len(x) == 3 for x in pictures.values())
    sampled = diffusion_distillation_metrics.sampled_images(work, TINY, data, 0, 2)
    assert list(sampled) == ["100", "16", "8", "4", "2", "1"] and sampled["100"].shape == (2, 1, 8, 8)


def test_published_networks_come_with_their_configuration(trained, data, tmp_path):
    work, target = tmp_path / "work", tmp_path / "models" / "diff-s0"
    shutil.copytree(trained[0], work)
    (work / "cd.pt").touch()
    (target / "old").mkdir(parents=True)
    recipe = replace(TINY, t=50.0, skip=False)
    few_step.save_config(work, recipe, few_step.scalings_of(data, recipe))
    assert few_step.publish(work, target) == target and not work.exists()
    assert {"teacher", "cd", "pd-1", "recipe.json"} <= {p.name for p in target.iterdir()}
    assert not {"old", "cd.pt"} & {p.name for p in target.iterdir()}
    assert few_step.load_config(target) == (recipe, few_step.scalings_of(data, recipe))
    assert few_step.publish(target, target) == target  # a cell that is run again
    with pytest.raises(FileNotFoundError, match=r"expected recipe.json in .* run `dvc repro`"):
        few_step.load_config(tmp_path)


def test_without_the_skip_connection_the_student_is_its_network(trained, data, tmp_path):
    work, _ = trained
    recipe = replace(TINY, skip=False)
    net, history = few_step_training.train_consistency(load_network(work / "teacher"), data, recipe, 0)
    assert len(history) == 2
    scalings = few_step.scalings_of(data, recipe)
    assert few_step.precondition(net, scalings, recipe) is net
    z = add_noise(data.test.x[:4], recipe.t, randn_like(seeded_generator(0, "z")))
    assert run_sampler(few_step.consistency_sampler(net, scalings, 2, recipe), z).shape == z.shape


def test_frechet_is_that_of_two_gaussians_and_of_scipys_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 5)), rng.normal(1.0, 2.0, (300, 5)) @ rng.normal(size=(5, 5))
    first, second = (torch.from_numpy(m) for m in (a, b))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert diffusion_distillation_metrics.frechet_distance(first, second) == pytest.approx(expected)
    assert diffusion_distillation_metrics.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert diffusion_distillation_metrics.frechet_distance(first, 3 * first + 1) == pytest.approx(
        (2 * a.mean(0) + 1) @ (2 * a.mean(0) + 1) + 4 * np.trace(np.cov(a.T))
    )


def test_features_are_the_last_convolutions_averaged_over_places(cnn):
    x = torch.rand(3, 1, 8, 8, generator=seeded_generator(0, "x"))
    with torch.no_grad():
        expected = cnn[:5](x).double().mean((2, 3))
    assert isinstance(cnn[5], nn.Flatten)
    torch.testing.assert_close(diffusion_distillation_metrics.classifier_features(cnn, x), expected)


def test_metrics_over_draws_by_hand(cnn, digits):
    """A sampler that returns the middle grey plus noise of 0.1 has that variance; one that never varies has none."""
    test = Split(digits[0][:60], digits[1][:60])

    def noisy(z, randn_like):
        return 0.5 + 0.1 * randn_like(z)

    samplers = {"sde-100": (100, noisy), "ode-100": (100, lambda z, randn_like: test.x[: len(z)]), "pd-4": (4, noisy)}
    rows = diffusion_distillation_metrics.metrics_over_draws(samplers, test, cnn, TINY, 0, 8)
    assert list(rows) == ["sde-100", "ode-100", "sde-100 again", "pd-4"]
    assert rows["pd-4"]["diversity"] == pytest.approx(0.01, rel=0.03) and rows["ode-100"]["diversity"] == 0
    assert rows["sde-100"]["posterior"] == 0 < rows["sde-100 again"]["posterior"] < rows["ode-100"]["posterior"] / 2
    assert rows["sde-100 again"]["frechet_sde"] < 0.1 * rows["ode-100"]["frechet_sde"]
    assert rows["ode-100"]["accuracy"] == (cnn(test.x).argmax(1) == test.y).double().mean().item()
    assert rows["ode-100"]["accuracy"] > 0.9 > 0.5 > rows["pd-4"]["accuracy"]


def test_answers_that_are_not_finite_are_no_accuracy_over_draws(cnn, digits, monkeypatch):
    test = Split(digits[0][:60], digits[1][:60])
    predict = diffusion_distillation_metrics.predict_logits

    def spoilt(model, x, *options):  # `predict_logits` itself refuses such answers
        z = predict(model, x, *options)
        return z.masked_fill((test.y == 0)[:, None], torch.nan) if model is cnn else z

    monkeypatch.setattr(diffusion_distillation_metrics, "predict_logits", spoilt)
    samplers = dict.fromkeys(("sde-100", "ode-100"), (100, lambda z, randn_like: test.x))
    rows = diffusion_distillation_metrics.metrics_over_draws(samplers, test, cnn, TINY, 0, 2)
    right = (cnn(test.x).argmax(1) == test.y) & (test.y != 0)
    assert rows["sde-100"]["accuracy"] == right.double().mean().item() > 0.5


def test_costs_and_the_better_student_by_hand(data):
    recipe = replace(TINY, first=4, solver="heun")
    histories = {
        "teacher": [{"score": -9.0}],
        "pd-2": [{"score": -0.5}, {"score": -0.3}],
        "pd-1": [{"score": -0.6}, {"score": -0.4}],
        "cd": [{"score": -0.8}, {"score": -0.4}, {"score": -0.1}],
    }
    cost = diffusion_distillation_metrics.training_costs(histories, recipe, 10)
    assert cost["curve"]["pd"] == [[50, 0.5, 2], [100, 0.3, 2], [150, 0.6, 1], [200, 0.4, 1]]
    assert cost["curve"]["cd"] == [[60, 0.8, 1], [120, 0.4, 1], [180, 0.1, 1]]
    assert cost["passes"] == {"pd": 200, "cd": 180} and cost["cd_equals_pd"] == 120 / 200
    never = diffusion_distillation_metrics.training_costs(histories | {"cd": [{"score": -0.5}]}, recipe, 10)
    assert never["cd_equals_pd"] is None

    def ends(value):
        return lambda z, randn_like: torch.full_like(z, value)

    offsets = {"pd-4": 0.6, "cd-4": 0.7, "pd-2": 0.7, "cd-2": 0.6, "pd-1": 0.3, "cd-1": 0.5}
    samplers = {name: (1, ends(value)) for name, value in ({"ode-100": 0.5} | offsets).items()}
    better = diffusion_distillation_metrics.better_student(samplers, data, recipe)
    assert better == {4: "pd", 2: "cd", 1: "cd"}
    rows = {name: {"distance": (value - 0.5) ** 2} for name, value in offsets.items()}
    rows |= {f"ddim-{n}": {"distance": 0.05} for n in (4, 2, 1)}
    spread = {name: {"accuracy": 0.9} for name in offsets} | {"cd-2": {"accuracy": 0.8}, "sde-100": {"accuracy": 0.85}}
    out = diffusion_distillation_metrics.few_step_summary(rows, spread, better)
    assert out["better_2_gain"] == out["cd_2_gain"] == pytest.approx(0.05 - 0.01)
    assert out["better_4_gain"] == out["pd_4_gain"] == pytest.approx(0.05 - 0.01)
    assert out["better_2_accuracy"] == pytest.approx(-0.05) and out["pd_2_accuracy"] == pytest.approx(0.05)


def test_bad_settings_are_refused_before_any_training():
    few_step.check_recipe(small_recipe(), (8, 4, 2, 1), 8)
    for recipe, steps, size, words in (
        (small_recipe(), (8, 4, 1), 8, "got .* without 2"),
        (small_recipe(first=4), (4, 2, 1), 8, "at least 8 steps"),
        (small_recipe(first=48), (4, 2, 1), 8, "expected a power of 2"),
        (small_recipe(t=200.0), (4, 2, 1), 8, "all levels up to t"),
        (small_recipe(channels=(8, 8, 8)), (4, 2, 1), 6, "expected a size divisible by 4"),
    ):
        with pytest.raises(ValueError, match=words):
            few_step.check_recipe(recipe, steps, size)


def test_a_recipe_is_a_section_of_a_profile_without_defaults():
    settings = compose_profile("digits")["diff"]
    assert few_step.few_step_recipe(settings).levels == tuple(settings["levels"])
    with pytest.raises(ValueError, match="got none for skip"):
        few_step.few_step_recipe({name: value for name, value in settings.items() if name != "skip"})


@pytest.mark.slow
def test_one_step_of_each_at_the_real_sizes_of_cifar10(tmp_path):
    try:
        data = load_dataset("cifar10", n_labels=10)
    except OSError as error:
        pytest.skip(f"no CIFAR-10 here: {error}")
    few = Split(data.train.x[:2], data.train.y[:2])
    data = replace(data, train=few, val=few)
    changes = {"first": 8, "teacher_epochs": 1, "round_epochs": 1, "cd_epochs": 1, "batch_size": 2}
    recipe = few_step.few_step_recipe(compose_profile("cifar10")["diff"] | changes)
    histories = diffusion_distillation.train_networks(data, recipe, 0, tmp_path)
    assert all(len(rows) == 1 and np.isfinite(rows[0]["loss"]) for rows in histories.values())
    nets = {name: load_network(tmp_path / name) for name in histories}
    assert sum(p.numel() for p in nets["teacher"].parameters()) > 10e6
    for name in ("pd-4", "pd-2", "pd-1", "cd"):
        assert not torch.equal(nets[name].conv_in.weight, nets["teacher"].conv_in.weight), name


def test_each_round_of_the_speed_claims_compares_students_with_the_teacher(monkeypatch):
    """Evaluations of the network take the place of seconds: a hundred of them against one or two."""
    build_unet, calls = benchmark.build_unet, []

    def counted(*shape, **options):
        net = build_unet(*shape, **options)
        net.register_forward_pre_hook(lambda *_: calls.append(1))
        return net

    def evaluations(work, repeats):
        calls.clear()
        work()
        return len(calls)

    monkeypatch.setattr(benchmark, "build_unet", counted)
    monkeypatch.setattr(benchmark, "mean_seconds", evaluations)
    params = {name: compose_profile("smoke")[name] for name in ("diff", "dp")} | {"data": {"dataset": "digits"}}
    rows = benchmark.purification_speed(params, rounds=2, batch=4, turns=1)
    kinds = ("", "_classified", "_alone")
    names = {f"{name}{kind}" for name in ("ddim_1", "cd_1", "cd_2") for kind in kinds}
    assert len(rows) == 2 and all(set(row) == names | {"n_test"} and row["n_test"] == 4 for row in rows)
    assert all(row[name] == (50 if name.startswith("cd_2") else 100) for row in rows for name in names)


def test_the_speed_table_has_every_sampler_and_says_what_does_not_work_here():
    def broken(net):
        raise RuntimeError("no compiler\nat all")

    params = {"data": {"dataset": "digits"}, "diff": compose_profile("smoke")["diff"]}
    table = benchmark.diff_speed(params, 1, {"eager": benchmark.BENCH_MODES["eager"], "slow": broken}, batch=8)
    assert len(table) == 15 and table["slow: RuntimeError: no compiler at all"]["images/s"] == "–"
    for name, row in (item for item in table.items() if item[0].startswith("eager")):
        n = int(name.split()[-1])
        assert row["images/s"] > 0 and row["× evaluations"] == pytest.approx(row["× teacher"] * n / 100)
    assert (
        table["eager, batch 8: teacher, SDE in 100"]["× teacher"] == 1 < table["eager, batch 8: PD in 1"]["× teacher"]
    )
