"""Images of one's own, folders, .npz files and torch Datasets: one rule, for evaluate, attack and purify."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lib.commands import named
from lib.data import load_dataset
from lib.pretrained import pretrained_folder
from lib.purify import load_purifier, purify
from lib.utils.images import RESIZE_RULE, fit_image, read_image, write_image

DATASETS = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from lib.data import load_dataset

points = load_dataset("digits").test
read = []


class Digits(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 20

    def __getitem__(self, k):
        read.append(k)
        return self.form(points.x[k]), int(points.y[k])


def as_bytes(x):
    return (255 * x).round().to(torch.uint8)


tensors = lambda: Digits(lambda x: x)
whole = lambda: Digits(as_bytes)
pillow = lambda: Digits(lambda x: Image.fromarray(as_bytes(x)[0].numpy()).resize((24, 16), Image.Resampling.NEAREST))
ready = tensors()
uneven = lambda: Digits(lambda x: x if x[0, 0, 2] > 0 else x[:, 1:])
arrays = lambda: Digits(lambda x: x.numpy())
bare = lambda: [points.x[0], points.x[1]]
endless = lambda: iter([])
"""


@pytest.fixture
def own_data(own, monkeypatch):
    """A visitor's folder with Datasets in `sets.py`, models in `mine.py` and class folders in `images`."""
    (own / "sets.py").write_text(DATASETS)
    monkeypatch.delitem(sys.modules, "sets", raising=False)
    points = load_dataset("digits").test
    for k in range(12):
        folder = own / "images" / str(int(points.y[k]))
        folder.mkdir(parents=True, exist_ok=True)
        write_image(points.x[k], folder / f"{k:02}.png")
    return own


def test_one_rule_brings_an_image_to_a_size():
    x = torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0))
    y = fit_image(x, 6)
    pillow = [Image.fromarray(c.numpy()).resize((10, 6), Image.Resampling.BILINEAR) for c in x]
    expected = torch.stack([torch.from_numpy(np.array(c)) for c in pillow])[:, :, 2:8]
    assert y.shape == (3, 6, 6) and (y - expected).abs().max() < 1e-5  # Pillow's antialiased bilinear, the centre
    assert torch.equal(fit_image(y, 6), y) and fit_image(x[:, :3, :7], 5).shape == (3, 5, 5)
    assert torch.allclose(fit_image(torch.full((1, 9, 31), 0.25), 8), torch.tensor(0.25))


def test_a_folder_of_any_sizes_and_formats_takes_the_named_models_form(call, own_data):
    points = load_dataset("digits").test
    wide = Image.new("RGB", (40, 30), (200, 200, 200))
    wide.save(own_data / "images" / str(int(points.y[0])) / "wide.jpg", quality=95)
    x, rows, facts = named.draw_images("images", 99, 0, *named.image_form("digits/natural", None))
    assert x.x.shape[1:] == (1, 8, 8) and len(rows) == len(x.y) == 13
    assert facts["resized"] == 1 and facts["rule"] == RESIZE_RULE and facts["kind"] == "folder"
    files = sorted(p for p in (own_data / "images").rglob("*") if p.is_file())
    for image, row, label in zip(x.x, rows, x.y, strict=True):
        file = files[row]
        assert torch.equal(image, fit_image(read_image(file, 1, None), 8))
        assert facts["classes"][label] == file.parent.name
    code, _, _ = call("evaluate", "digits/natural", "--data", "images", "--eps", "0.1", "--json", "out.json")
    result = json.loads((own_data / "out.json").read_text())
    assert code in (0, 3) and result["source"] == facts and result["n"] == len(rows)


def test_a_torch_dataset_is_read_where_it_is_drawn(own_data):
    points = load_dataset("digits").test
    x, rows, facts = named.draw_images("sets:tensors", 5, 0)
    assert (
        sys.modules["sets"].read == rows
        and len(set(rows)) == 5
        and facts["kind"] == "torch Dataset"
        and facts["resized"] == 0
    )
    assert torch.equal(x.x, points.x[rows]) and torch.equal(x.y, points.y[rows])
    assert torch.equal(named.draw_images("sets:ready", 5, 0)[0].x, x.x)
    assert (named.draw_images("sets:whole", 5, 0)[0].x - x.x).abs().max() <= 0.5 / 255 + 1e-6
    resized, _, facts = named.draw_images("sets:pillow", 5, 0, 1, 8)
    assert resized.x.shape == (5, 1, 8, 8) and facts["resized"] == 5 and facts["rule"] == RESIZE_RULE


@pytest.mark.parametrize("data", ["images", "sets:tensors", "own.npz"])
def test_evaluate_attack_and_purify_take_all_of_them(call, own_data, data):
    points = load_dataset("digits").test
    np.savez(own_data / "own.npz", x=points.x[:9].numpy(), y=points.y[:9].numpy())
    ball = ("--data", data, "--eps", "0.1", "--images", "4")
    assert call("evaluate", "digits/natural", *ball, "--json", "out.json")[0] in (0, 3)
    assert json.loads((own_data / "out.json").read_text())["n"] == 4
    assert call("attack", "digits/natural", "out.npz", *ball)[0] in (0, 3)
    code, text, _ = call("purify", data, "pure.npz", "--purifier", "digits/adaptive-1", "--images", "4", "--seed", "0")
    assert code == 0 and text == "4 images purified by digits/adaptive-1: pure.npz\n"
    with np.load(own_data / "out.npz") as attacked, np.load(own_data / "pure.npz") as pure:
        assert np.array_equal(pure["x"], attacked["x"]) and np.array_equal(pure["numbers"], attacked["numbers"])
        net = load_purifier(pretrained_folder("digits/diffusion"), "adaptive-1", clamp=False)
        expected = purify(net, torch.from_numpy(pure["x"]), 0, progress=False)
        assert np.array_equal(pure["x_purified"], expected) and not np.array_equal(pure["x"], expected)


def test_files_of_images_are_purified_by_name_and_resized_on_demand(call, own_data):
    (own_data / "in").mkdir()
    Image.new("L", (24, 16), 90).save(own_data / "in" / "wide.png")
    code, _, said = call("purify", "in", "pure", "--purifier", "digits/adaptive-1")
    assert code == 1 and "expected 8 x 8 pixels, got 24 x 16" in said
    code, text, _ = call("purify", "--purifier", "digits/adaptive-1", "--resize", "in", "pure")
    assert code == 0 and "1 images purified by adaptive-1: pure" in text
    assert read_image(own_data / "pure" / "wide.png", 1, 8).shape == (1, 8, 8)


def test_the_form_of_images_comes_from_what_is_named(own_data):
    assert named.image_form("digits/natural", None) == (1, 8) == named.image_form("mine:plain", "digits/adaptive-1")
    assert named.image_form("mine:plain", None) == (None, None) == named.image_form("digits/absent", None)
    x, _, _ = named.draw_images("images", 2, 0)
    assert x.x.shape[1:] == (named.CHANNELS, named.SIZE, named.SIZE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("sets:absent", "expected a function 'sets:absent' that returns a torch Dataset, got none"),
        ("sets:endless", "expected 'sets:endless' to return a torch Dataset, with length, got list_iterator"),
        (
            "sets:bare",
            "sets:bare: expected a tensor (c, h, w) or an image of Pillow, with a whole number as label, got",
        ),
        ("sets:arrays", "sets:arrays: expected a tensor (c, h, w) or an image of Pillow"),
        ("sets:uneven", "sets:uneven: expected images of one shape, got (1, 7, 8), (1, 8, 8): give --size"),
        ("empty", "expected a folder for each class in empty, with images"),
    ],
)
def test_what_is_no_images_is_refused_in_one_line(call, own_data, data, message):
    (own_data / "empty").mkdir()
    code, _, said = call("evaluate", "mine:plain", "--data", data, "--eps", "0.1")
    assert code == 1 and message in said and "\n" not in said
