"""Weights of `lib.utils.artifacts`: loaded as saved, and refused by name where they are broken or another network's."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.models import build_classifier
from lib.utils.artifacts import load_weights, save_weights


def test_fault_35_37_weights_that_are_broken_or_another_networks_are_refused(tmp_path):
    path, model = tmp_path / "m.safetensors", build_classifier("cnn", width=4, seed=0)
    save_weights(model, path)
    other = load_weights(build_classifier("cnn", width=4, seed=1), path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    weights = {name: weight.clone() for name, weight in load_file(path).items()}  # the file is written over below
    first = "1.weight"
    for change in (
        {first: weights[first] * float("nan")},
        {first: weights[first].half()},
        {first: weights[first].int()},
        {first: weights[first][:1].clone()},
        {"more": torch.zeros(1)},
    ):
        save_file(weights | change, path)
        with pytest.raises(ValueError, match=r"m\.safetensors: expected .*again") as info:
            load_weights(other, path)
        assert "\n" not in str(info.value)
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match=r"m\.safetensors: expected safetensors"):
        load_weights(other, path)
    next(iter(model.parameters())).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="expected finite weights"):
        save_weights(model, path)
