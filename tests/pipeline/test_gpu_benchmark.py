"""The benchmark of the GPU path, on a CPU with small networks: every way runs, and the gradients agree."""

import pytest

from lib.pipeline import gpu_benchmark
from lib.pipeline.gpu_benchmark import FLOAT32, WAYS, BenchSize, Way
from lib.utils.files import ROOT, read_json
from tests.recipes import small_recipe

TINY = BenchSize((8, 8), side=8, width=4, batch=4, steps=2, sampling=2, images=4, passes=8)


def test_every_work_is_measured_and_plain_is_one(monkeypatch):
    monkeypatch.setattr(
        gpu_benchmark, "speed_up", lambda net, *_, **__: net
    )  # types that tests check cannot be compiled
    tables = gpu_benchmark.gpu_benchmark(small_recipe(), TINY)
    assert list(tables) == [
        "training",
        "sampling 2 steps, batch 4",
        "sampling 2 steps, batch 1",
        "gradient with EOT 4 through one step and ResNet-18",
    ]
    for table in tables.values():
        assert table.keys() == WAYS.keys() and table[FLOAT32]["ratio"] == 1
        assert all(row["seconds"] > 0 for row in table.values())
    gradients = tables["gradient with EOT 4 through one step and ResNet-18"]
    assert (
        gradients[FLOAT32]["difference"] == gradients["compiled"]["difference"] == 0 == 1 - gradients[FLOAT32]["signs"]
    )
    assert 0 < gradients["bf16"]["difference"] < 0.3 and gradients["bf16"]["signs"] > 0.8


def test_a_copy_is_compiled_if_the_way_says_so(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_benchmark, "speed_up", lambda net, *_, **options: calls.append(options) or net)
    net = gpu_benchmark.build_unet(3, 8, (8, 8), seed=0)
    assert gpu_benchmark.prepare(net, Way(), TINY, 2) is not net and not calls
    gpu_benchmark.prepare(net, Way(True, "reduce-overhead"), TINY._replace(backend="eager"), 2)
    assert calls == [{"uses": ("training",), "backend": "eager", "mode": "reduce-overhead"}]


def test_ratios_are_medians_of_turns(monkeypatch):
    seconds = iter([2.0, 1.0, 4.0, 1.0, 6.0, 1.0])
    monkeypatch.setattr(gpu_benchmark, "mean_seconds", lambda call, repeats: next(seconds))
    out = gpu_benchmark.ratios({FLOAT32: lambda: None, "fast": lambda: None})
    assert out == {FLOAT32: {"seconds": 4, "ratio": 1}, "fast": {"seconds": 1, "ratio": 4}}


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu_benchmark, "gpu_benchmark", lambda *_: pytest.fail("measures"))
    gpu_benchmark.main([])
    assert "no CUDA GPU" in capsys.readouterr().out


def test_with_a_gpu_it_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_benchmark, "use_gpu", lambda: True)
    table = {"training": {FLOAT32: {"seconds": 1.0, "ratio": 1.0}}}
    monkeypatch.setattr(gpu_benchmark, "gpu_benchmark", lambda recipe, size: table)
    monkeypatch.setattr(gpu_benchmark, "device_name", lambda: "H0")
    monkeypatch.setattr(gpu_benchmark, "results_dir", lambda dataset, kind: ROOT / f"data/scratch/{dataset}-{kind}")
    gpu_benchmark.main(["--commit", "abc"])
    written = read_json(ROOT / "data/scratch/cifar10-bench/gpu.json")
    assert written["tables"] == table and written["device"] == "H0" and written["commit"] == "abc"
    assert "float32" in capsys.readouterr().out
    (ROOT / "data/scratch/cifar10-bench/gpu.json").unlink()
