"""On a machine with a CUDA GPU every experiment runs there; on others this is skipped, but for the rule of devices."""

import shutil

import nbformat
import pytest
import torch
from torch import nn

from lib.pipeline import profile
from lib.pipeline.notebook import run_notebook
from lib.pipeline.parameters import check_parameters, notebook_defaults
from lib.utils import device
from lib.utils.files import ROOT

EXPERIMENTS = {"kd": "01*", "dd": "02*", "rd": "03*", "diff": "04*", "dp": "05*"}


def test_images_follow_the_weights_of_the_network():
    far = nn.Linear(3, 2, device="meta")
    assert [t.device.type for t in device.to_model_device(far, torch.ones(1, 3), torch.ones(1))] == ["meta", "meta"]
    x = torch.ones(1, 3)
    for function in (nn.Flatten(), torch.flatten):  # without weights they stay
        assert device.to_model_device(function, x) == (x,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_every_experiment_runs_on_a_gpu(tmp_path, monkeypatch):
    """With the settings of `smoke`; experiments 2 and 5 find the networks of 1 and 4."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    smoke = profile.compose_profile("smoke")
    try:
        for section, name in EXPERIMENTS.items():
            (notebook,) = (ROOT / "notebooks").glob(name)
            values = smoke["data"] | smoke[section] | {"profile": "test-gpu", "seed": 0}
            values = check_parameters(values, notebook_defaults(notebook), notebook)
            out = run_notebook(notebook, tmp_path / notebook.name, values, progress=False)
            assert torch.cuda.get_device_name() in nbformat.read(out, as_version=4).cells[-1].source
    finally:
        for kind in ("data", "figures"):
            shutil.rmtree(ROOT / kind / "test-gpu", ignore_errors=True)
