"""Networks that come with the repository: what is written is what is loaded, and nothing else is."""

import re
import shutil

import pytest
import torch

from lib import models, pretrained, purify
from lib.commands import weights
from lib.diffusion.network import build_unet, load_facts
from lib.diffusion.schedule import t_to_sigma
from lib.distillation import few_step
from lib.distillation.consistency import ConsistencyScalings
from lib.models import build_classifier
from lib.pretrained import MEASURED, load_classifier, pretrained_folder, pretrained_names, save_classifier
from lib.purify import load_purifier
from lib.utils.files import ROOT, read_json
from tests.recipes import small_recipe

ABOUT = dict.fromkeys(MEASURED, 0)
NETWORK = {"arch": "resnet18", "in_channels": 1, "size": 8, "classes": 10, "width": 4}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    return tmp_path


def test_a_classifier_comes_back_in_half_precision(place):
    net, x = build_classifier(**NETWORK, seed=3).eval(), torch.rand(4, 1, 8, 8)
    before = net(x)
    folder = save_classifier("digits/resnet18", net, NETWORK, ABOUT)
    assert torch.equal(net(x), before) and net[1].weight.dtype == torch.float32  # as it was
    loaded = load_classifier("digits/resnet18")
    assert not loaded.training and not any(w.requires_grad for w in loaded.parameters())
    assert {w.dtype for w in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded(x), before, atol=2e-2) and not torch.equal(loaded(x), before)
    assert torch.equal(loaded(x), pretrained.round_weights(net)(x))  # what a card measures
    assert (folder / "weights.safetensors").stat().st_size < 0.6 * 4 * sum(w.numel() for w in net.parameters())


def test_names(place):
    assert pretrained_names() == []
    with pytest.raises(
        FileNotFoundError, match=r"expected a classifier 'digits/cnn' in data/pretrained, got none: .*none"
    ):
        load_classifier("digits/cnn")
    net = build_classifier(**NETWORK, seed=0)
    for name in ("digits/b", "digits/a"):
        save_classifier(name, net, NETWORK, ABOUT)
    assert pretrained_names() == ["digits/a", "digits/b"]
    with pytest.raises(FileNotFoundError, match="there are digits/a, digits/b"):
        load_classifier("digits/c")
    for name in ("digits", "a/b/c", "../a", "digits/..", "digits/"):
        with pytest.raises(ValueError, match="expected"):
            pretrained_folder(name)


def test_what_is_not_the_cards_is_refused(place):
    net = build_classifier(**NETWORK, seed=0)
    folder = save_classifier("digits/a", net, NETWORK, ABOUT)
    other = save_classifier("digits/b", build_classifier(**NETWORK, seed=1), NETWORK, ABOUT)
    (folder / "weights.safetensors").write_bytes((other / "weights.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"expected the weights that card[.]json states, got others"):
        load_classifier("digits/a")
    with pytest.raises(ValueError, match=r"expected a card with data, recipe, .*, got none for limits"):
        save_classifier("digits/c", net, NETWORK, {k: v for k, v in ABOUT.items() if k != "limits"})
    with torch.no_grad():
        net[-1].bias[0] = torch.inf
    with pytest.raises(ValueError, match="expected finite weights"):
        save_classifier("digits/c", net, NETWORK, ABOUT)
    assert pretrained_names() == ["digits/a", "digits/b"]


def test_a_folder_of_diffusion_networks_is_one_that_purifiers_are_loaded_from(place):
    recipe, net = small_recipe(first=8), build_unet(1, 8, small_recipe(first=8).channels, seed=0).eval()
    for kind in ("teacher", "cd"):
        pretrained.save_diffusion_network("digits/diffusion", kind, net, [{"epoch": 0}], ABOUT, skip=True)
    folder = pretrained_folder("digits/diffusion")
    few_step.save_config(folder, recipe, ConsistencyScalings(t_to_sigma(recipe.t), sigma_data=0.6))
    assert pretrained_names() == ["digits/diffusion"] and load_facts(folder / "cd")["about"] == ABOUT
    assert {w.dtype for w in net.parameters()} == {torch.float32}
    rounded, z = pretrained.round_weights(net), torch.randn(2, 1, 8, 8)
    for name in ("ddim-2", "cd-1"):
        purifier = load_purifier(folder, name)
        assert torch.equal(purifier.net(z, torch.tensor([50])).sample, rounded(z, torch.tensor([50])).sample)


def test_one_line_loads_what_comes_with_the_repository():
    assert {"digits/natural", "digits/trades"} <= set(models.list_models())
    listed = purify.list_purifiers()
    assert {"digits/clean-1", "digits/adaptive-1", "digits/label-n0-1", "digits/pd-1", "digits/sde-1"} <= set(listed)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in listed:
        purifier = purify.load(name)
        assert purifier(x).shape == x.shape and not any(w.requires_grad for w in purifier.parameters())
    plain = load_purifier(pretrained_folder("digits/diffusion"), "clean-2", clamp=False)
    loaded = purify.load("digits/clean-2", clamp=False)
    assert torch.equal(*(purify.purify(p, x, seed=1, progress=False) for p in (plain, loaded)))
    assert torch.equal(models.load("digits/trades")(x), load_classifier("digits/trades")(x))


@pytest.mark.parametrize(
    ("load", "name", "error", "words"),
    [
        (models.load, "digits/blue", FileNotFoundError, "there are .*digits/natural"),
        (models.load, "natural", ValueError, "expected a name such as cifar10/resnet18, got 'natural'"),
        (
            purify.load,
            "digits/blue-1",
            ValueError,
            "no purifier 'blue-1' in .*kind one of adaptive",
        ),
        (purify.load, "mnist/clean-1", FileNotFoundError, "of the data sets .*digits.*, got 'mnist/clean-1'"),
        (purify.load, "clean-1", FileNotFoundError, "expected a purifier such as digits/clean-1"),
    ],
)
def test_a_line_that_loads_nothing_says_what_there_is(load, name, error, words):
    with pytest.raises(error, match=words):
        load(name)


def test_changed_and_pickled_weights_are_not_loaded(place):
    shutil.copytree(ROOT / pretrained.PRETRAINED / "digits", place / pretrained.PRETRAINED / "digits")
    assert purify.load("digits/clean-1") and models.load("digits/natural")
    for folder, name in (("diffusion/clean", "diffusion_pytorch_model"), ("natural", "weights")):
        path = place / pretrained.PRETRAINED / "digits" / folder / f"{name}.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # one bit
        path.write_bytes(content)
        call = (lambda: purify.load("digits/clean-1")) if "clean" in folder else lambda: models.load("digits/natural")
        with pytest.raises(ValueError, match=r"changed or exchanged|expected the weights that card"):
            call()
        path.unlink()
        torch.save({"a": torch.zeros(1)}, path.with_suffix(".bin"))
        with pytest.raises((ValueError, FileNotFoundError)):
            call()


def test_the_page_of_weights_is_that_of_the_cards():
    page = (ROOT / weights.PAGE).read_text(encoding="utf-8")
    assert page == weights.weights_page(), "run `python -m lib weights --write`"
    card = read_json(pretrained_folder("digits/trades") / "card.json")
    shares = [f"{100 * card['metrics']['trades'][key]:.1f}" for key in weights.SHARES]
    assert f'`lib.models.load("digits/trades")` | {" | ".join(shares)} |' in page and card["sha256"][:12] in page
    calls = re.findall(r'`lib\.(models|purify)\.load\("(.+?)"\)`', page)
    assert len(calls) == page.count("load(") and {kind for kind, _ in calls} == {"models", "purify"}
    for kind, name in calls:
        assert {"models": models, "purify": purify}[kind].load(name)
