"""The classifier and the images that the cross-check attacks."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from lib.models import build_classifier

IMAGES = 128


@pytest.fixture(scope="session")
def victim():
    """A CNN of width 8 on sklearn's digits, as in tests/conftest.py, and test images that it classifies correctly."""
    from tests.crosscheck.independent import Victim  # needs foolbox and ART

    torch.set_num_threads(1)
    bunch = load_digits()
    x, y = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    model = build_classifier("cnn", width=8, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for a, b in zip(x[:1297].split(64), y[:1297].split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    x, y = x[-200:], y[-200:]
    correct = (model(x).argmax(1) == y).nonzero().squeeze(1)[:IMAGES]
    assert len(correct) == IMAGES
    return Victim(model, x[correct], y[correct])
