"""Shared fixtures: sklearn's digits and one small CNN trained on them, once per session."""

import os
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from lib.diffusion.network import build_unet, save_network
from lib.diffusion.schedule import t_to_sigma
from lib.distillation import few_step
from lib.distillation.consistency import ConsistencyScalings
from lib.models import build_classifier
from lib.utils.files import ROOT
from tests.recipes import small_recipe

SHARED = ROOT.parent / "shared" / "data" / "unpack.py"

torch.set_num_threads(1)
os.environ["ACCELERATE_USE_CPU"] = "true"  # equal bits everywhere; tests/test_gpu.py asks for the GPU


def pytest_collection_modifyitems(items):
    """Begins with the longest test, so that the others run beside it when there are several workers."""
    items.sort(key=lambda item: "from_scratch" not in item.name)


@pytest.fixture(scope="session")
def real_mirror(tmp_path_factory):
    """The mirror of the shared data folder."""
    if not SHARED.exists():
        pytest.skip("no shared/data/unpack.py next to the repository")
    folder = tmp_path_factory.mktemp("mirror")
    subprocess.run([sys.executable, SHARED, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def digits():
    """The 1797 digits, n 1 8 8 in [0, 1], and their labels; the first 1297 are for training."""
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


@pytest.fixture(scope="session")
def shared_cnn(digits):
    """A CNN of width 8, about 98 % right on the last 500 digits, in eval mode; nobody may change it."""
    x, y = (t[:1297] for t in digits)
    model = build_classifier("cnn", width=8, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for a, b in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of untrained networks, as experiment 4 leaves it; nobody may change it."""
    recipe = small_recipe(first=8)
    work = tmp_path_factory.mktemp("models") / "work"
    for seed, name in enumerate(("teacher", "sampler", "cd", "pd-4", "pd-2", "pd-1")):
        save_network(build_unet(1, 8, recipe.channels, seed=seed), work / name)
    few_step.save_config(work, recipe, ConsistencyScalings(t_to_sigma(recipe.t), sigma_data=0.6))
    return few_step.publish(work, work.parent / "diff-s0")


@pytest.fixture
def cnn(shared_cnn):
    """The shared CNN; the test that leaves it in another mode or with gradients fails, rather than the next one."""
    yield shared_cnn
    assert not any(m.training for m in shared_cnn.modules())
    assert all(p.grad is None for p in shared_cnn.parameters())
