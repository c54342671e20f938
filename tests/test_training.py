"""The one loop: schedules, averaging, early stop, resuming, seeding, precision, clear failures."""

import io
import math
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib import training
from lib.models import build_classifier
from lib.training import hard_label_loss, learning_rate, train
from lib.utils.augmentation import shift_flip
from lib.utils.files import ROOT

X = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 10
quiet = partial(train, progress=False, batch_size=16)


def fresh(dropout: float = 0.3) -> nn.Module:
    return build_classifier("cnn", width=4, dropout=dropout, seed=0)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_rates_by_hand():
    assert learning_rate(0.25, 1.0, "cosine") == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert [learning_rate(d, 1.0, "step") for d in (0.49, 0.5, 0.75)] == pytest.approx([1, 0.1, 0.01])  # decays twice
    assert learning_rate(0.05, 1.0, "constant", warmup=0.1) == pytest.approx(0.5)


def test_the_rate_that_a_run_logs_decays_twice():
    rows = quiet(fresh(), hard_label_loss, (X, Y), epochs=4, lr=1.0e-2, schedule="step").history
    assert [r["lr"] for r in rows] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])


def test_it_learns_and_equal_seeds_give_equal_bits():
    runs = [quiet(fresh(), hard_label_loss, (X, Y), epochs=8, lr=1e-2, seed=s) for s in (0, 0, 1)]
    assert runs[0].history[-1]["loss"] < runs[0].history[0]["loss"]
    assert same(runs[0].last, runs[1].last) and runs[0].history == runs[1].history
    assert not same(runs[0].last, runs[2].last)


def test_the_logged_loss_is_the_mean_over_images():
    model = fresh(0.0)
    expected = hard_label_loss(model, X, Y, generator=torch.Generator(), epoch=0)[0].item()
    row = quiet(model, hard_label_loss, (X, Y), epochs=1, lr=1e-12).history[0]  # the last batch has 2 images only
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_global_state_stays():
    before = torch.get_rng_state()
    quiet(fresh(), hard_label_loss, (X, Y), epochs=1)
    assert torch.equal(before, torch.get_rng_state())


class Interrupted(Exception):
    pass


@contextmanager
def interrupted(epochs: int):
    """Kills the training in the block before it saves one epoch more than these."""
    real, calls = training.save_state, []

    def save(*rest):
        calls.append(1)
        if len(calls) > epochs:
            raise Interrupted
        real(*rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "save_state", save)
        yield


@contextmanager
def counted(epochs: list[int]):
    """Appends the number of each epoch that is trained in the block."""
    real = training._run_epoch

    def run(state, *rest):
        epochs.append(state.epoch)
        return real(state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_run_epoch", run)
        yield


def spread(model: nn.Module) -> float:
    """Returns a score of a network without any state."""
    with torch.no_grad():
        return model(X).std().item()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, ema):
    noisy = partial(shift_flip, pad=1, flip=True)
    options = {"epochs": 5, "lr": 1e-2, "ema": ema, "augment": noisy, "validate": spread}
    whole = quiet(fresh(), hard_label_loss, (X, Y), **options)
    file = tmp_path / "run.ckpt"
    with interrupted(3):
        quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
    epochs = []
    with counted(epochs):
        resumed = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
    assert epochs == [3, 4]
    assert same(whole.last, resumed.last) and same(whole.best, resumed.best)
    assert whole.history == resumed.history and whole.best_epoch == resumed.best_epoch
    foreign = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, epochs=2, lr=1e-2)
    assert len(foreign.history) == 2  # another setting: the old checkpoint is not its own
    with counted(epochs):  # nor is it lost
        again = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
    assert epochs == [3, 4] and same(whole.last, again.last)


def test_best_weights_are_returned_and_patience_ends_the_run():
    scores, model = iter([0.1, 0.9, 0.2, 0.3, 0.4]), fresh()
    run = quiet(model, hard_label_loss, (X, Y), epochs=5, lr=1e-2, validate=lambda m: next(scores), patience=2)
    assert (run.best_epoch, len(run.history)) == (1, 4)
    assert same(model.state_dict(), run.best) and not same(run.best, run.last)


def test_ema_of_weights_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    start, steps = model[1].weight.detach().clone(), []

    def loss(net, x, y, *, generator, epoch):
        steps.append(net[1].weight.detach().clone())
        return hard_label_loss(net, x, y, generator=generator, epoch=epoch)

    train(
        model,
        loss,
        (X, Y),
        epochs=3,
        batch_size=50,
        lr=1e-1,
        optimizer="sgd",
        ema=0.8,
        schedule="constant",
        progress=False,
    )
    w1, w2 = steps[1], steps[2]
    assert torch.equal(steps[0], start)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    plain[1].weight.data.copy_(start)
    w3 = train(
        plain,
        hard_label_loss,
        (X, Y),
        epochs=3,
        batch_size=50,
        lr=1e-1,
        optimizer="sgd",
        schedule="constant",
        progress=False,
    ).last
    expected = 0.8 * (0.8 * w1 + 0.2 * w2) + 0.2 * w3["1.weight"]  # the average starts at the first updated weights
    torch.testing.assert_close(model[1].weight, expected)


def test_nan_stops_the_run_by_name():
    def broken(model, x, y, *, generator, epoch):
        return model(x).sum() * (math.nan if epoch == 1 else 0.0), {}

    with pytest.raises(FloatingPointError, match="student: expected a finite loss, got nan in epoch 1"):
        quiet(fresh(), broken, (X, Y), epochs=3, name="student")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adma"}, "expected optimizer to be one of 'adam', 'adamw', 'sgd', got 'adma'"),
        ({"schedule": "linear"}, "expected schedule to be one of 'constant', 'cosine', 'step', got 'linear'"),
        ({"precision": "fp8"}, "expected precision to be one of 'no', 'fp16', 'bf16', got 'fp8'"),
        ({"epochs": 0}, "expected epochs to be an integer >= 1, got 0"),
        ({"ema": 1.0}, "expected ema to be a finite number >= 0 and < 1, got 1.0"),
    ],
)
def test_unusable_settings_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        quiet(fresh(), hard_label_loss, (X, Y), **({"epochs": 1} | options))


def test_a_frozen_model_and_unequal_tensors_are_refused():
    with pytest.raises(ValueError, match="frozen as a teacher"):
        quiet(fresh().requires_grad_(False), hard_label_loss, (X, Y), epochs=1)
    with pytest.raises(ValueError, match=r"got lengths \[50, 49\]"):
        quiet(fresh(), hard_label_loss, (X, Y[1:]), epochs=1)


def test_shift_moves_whole_images_by_at_most_pad():
    x = torch.zeros(200, 1, 5, 5)
    x[:, :, 2, 2] = 1
    x[:, :, 2, 3] = 0.5  # tells a mirrored image
    out = shift_flip(x, pad=1, flip=True, generator=torch.Generator().manual_seed(0))
    places = {tuple(divmod(int(i), 5)) for i in out.flatten(1).argmax(1)}
    assert places == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}
    mirrored = [out[i, 0].flatten()[int(out[i].argmax()) - 1] == 0.5 for i in range(200)]
    assert 60 < sum(mirrored) < 140
    assert torch.equal(out.flatten(1).sum(1), torch.full((200,), 1.5))


DEFAULT_RUN = """
import torch
from lib.models import build_classifier
from lib.training import hard_label_loss, train
torch.set_num_threads(1)
x, y = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10
model = build_classifier("cnn", width=4, dropout=0.3, seed=0)
run = train(model, hard_label_loss, (x, y), epochs=2, lr=1e-2, batch_size=16, progress=False)
print(run.history[-1]["loss"].hex(), sum(v.double().sum().item() for v in run.last.values()).hex())
"""


def default_run() -> tuple[str, str]:
    """The loss and the sum of the weights of `DEFAULT_RUN` in this process, with all bits."""
    run = quiet(fresh(), hard_label_loss, (X, Y), epochs=2, lr=1e-2)
    return run.history[-1]["loss"].hex(), sum(v.double().sum().item() for v in run.last.values()).hex()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_of_one_call_and_default_calls_around_it_equal_a_new_process(precision):
    alone = subprocess.run([sys.executable, "-c", DEFAULT_RUN], capture_output=True, text=True, check=True, cwd=ROOT)
    before = default_run()
    dtypes = []

    def loss(model, x, y, *, generator, epoch):
        hook = model[-1].register_forward_hook(lambda m, i, z: dtypes.append(z.dtype))
        z = model(x)
        hook.remove()
        dtypes.append(z.dtype)
        return F.cross_entropy(z, y), {}

    model = fresh()
    low = quiet(model, loss, (X, Y), epochs=2, lr=1e-2, precision=precision)
    inside = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(dtypes[::2]) == {inside} and set(dtypes[1::2]) == {torch.float32}
    assert math.isfinite(low.history[-1]["loss"]) and low.history[-1]["loss"].hex() != before[0]
    assert "forward" not in vars(model) and model(X).dtype == torch.float32
    assert all(v.dtype != inside for v in low.last.values())
    assert before == default_run() == tuple(alone.stdout.split())


def test_networks_are_validated_in_float32_whatever_the_precision_of_training():
    seen = []
    quiet(fresh(), hard_label_loss, (X, Y), epochs=1, precision="bf16", validate=lambda m: seen.append(m(X)) or 0.0)
    model = fresh()
    quiet(model, hard_label_loss, (X, Y), epochs=1, precision="bf16")
    assert torch.equal(seen[0], model(X))


def test_a_scaled_loss_in_fp16_is_resumed_with_its_scale(tmp_path):
    """The gradient of a tiny loss vanishes in fp16 unless it is scaled."""
    file, options = tmp_path / "run.ckpt", {"epochs": 3, "lr": 1e-2, "precision": "fp16", "clip": 1.0}

    whole = quiet(fresh(), hard_label_loss, (X, Y), **options)
    with interrupted(2):
        quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
    scale = torch.load(file, weights_only=True)["scaler"]["_growth_tracker"]
    assert scale == 8  # steps since the scale last changed: two epochs of four
    resumed = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
    assert same(whole.last, resumed.last)


def bound_loss(model, x, y, *, teacher, weight, generator, epoch):
    """Returns a loss of a teacher and a number that are bound to it."""
    return F.cross_entropy(model(x), y) + weight * (model(x) - teacher(x)).square().mean(), {}


def teacher(seed: int = 1) -> nn.Module:
    return build_classifier("cnn", width=4, seed=seed).eval().requires_grad_(False)


OTHER_CALLS = {
    "loss": {"loss": lambda model, x, y, *, generator, epoch: (-model(x).sum(), {})},
    "bound number": {"loss": partial(bound_loss, teacher=teacher(), weight=0.2)},
    "bound teacher": {"loss": partial(bound_loss, teacher=teacher(2), weight=0.1)},
    "images": {"tensors": (X.flip(0), Y)},
    "one pixel": {"tensors": (torch.where(X.max() == X, 0.0, X), Y)},
    "labels": {"tensors": (X, Y.flip(0))},
    "augment": {"augment": partial(shift_flip, pad=1, flip=False)},
    "validate": {"validate": lambda model: -spread(model)},
    "weights": {"model": lambda: build_classifier("cnn", width=4, dropout=0.3, seed=5)},
    "dropout": {"model": lambda: fresh(0.4)},
    "seed": {"seed": 1},
    "patience": {"patience": 4},
    "lr": {"lr": 2e-2},
}


def call(file: Path, **change) -> training.Trained:
    options = {"epochs": 3, "lr": 1e-2, "augment": partial(shift_flip, pad=1, flip=True), "validate": spread}
    options |= {"model": fresh, "loss": partial(bound_loss, teacher=teacher(), weight=0.1), "tensors": (X, Y)} | change
    make = options.pop("model")
    return quiet(make(), options.pop("loss"), options.pop("tensors"), checkpoint=file, **options)


@pytest.mark.parametrize("change", OTHER_CALLS)
def test_fault_05_another_training_begins_anew_and_the_first_one_finds_its_file_again(tmp_path, capsys, change):
    first, epochs = tmp_path / "first.pt", []
    whole, other = call(tmp_path / "whole.pt"), call(tmp_path / "other.pt", **OTHER_CALLS[change])
    with interrupted(2):
        call(first)
    assert capsys.readouterr().err == ""
    with counted(epochs):
        got = call(first, **OTHER_CALLS[change])
    assert epochs[0] == 0 and same(got.last, other.last) and got.history == other.history
    assert f"{first} was renamed to first.pt." in capsys.readouterr().err
    epochs.clear()
    with counted(epochs):
        assert same(call(first).last, whole.last) and epochs == [2]


def test_fault_05_a_loss_that_cannot_be_hashed_is_refused_with_checkpoint(tmp_path):
    lock = threading.Lock()

    def loss(model, x, y, *, generator, epoch):
        with lock:
            return hard_label_loss(model, x, y, generator=generator, epoch=epoch)

    with pytest.raises(TypeError, match=r"got a lock as training.loss.lock, whose state cannot be hashed: ") as error:
        quiet(fresh(), loss, (X, Y), epochs=1, checkpoint=tmp_path / "run.pt")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    assert quiet(fresh(), loss, (X, Y), epochs=1).history


def test_a_generator_of_a_networks_own_goes_on_where_it_was(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self._noise = fresh(), torch.Generator().manual_seed(3)

        def forward(self, x):
            return self.net(x + 0.1 * torch.randn(x.shape, generator=self._noise))

    whole = quiet(Noisy(), hard_label_loss, (X, Y), epochs=3)
    with interrupted(2):
        quiet(Noisy(), hard_label_loss, (X, Y), epochs=3, checkpoint=tmp_path / "a.pt")
    assert same(quiet(Noisy(), hard_label_loss, (X, Y), epochs=3, checkpoint=tmp_path / "a.pt").last, whole.last)


def broken(content: bytes) -> dict[str, bytes]:
    """Returns a checkpoint's content broken in many ways."""
    rng, flips = random.Random(0), {}
    for i in range(60):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        flips[f"flip {i}"] = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
    buffer = io.BytesIO()
    torch.save({"key": "x", "epoch": 2}, buffer)
    foreign = {"empty": b"", "pickle": pickle.dumps({"key": 1}), "torch": buffer.getvalue(), "text": b"text" * 100}
    return flips | foreign | {f"cut {n}": content[:n] for n in (1, 31, 32, 33, 1000, len(content) - 1)}


def test_fault_43_a_broken_checkpoint_is_set_aside_by_name_and_the_training_begins_again(tmp_path, capsys):
    file = tmp_path / "run.pt"
    options = {"epochs": 1, "lr": 1e-2, "batch_size": 50}
    whole = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
    content = file.read_bytes()
    for name, changed in broken(content).items():
        file.write_bytes(changed)
        capsys.readouterr()
        result = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, **options)
        assert same(result.last, whole.last) and result.history == whole.history, name
        assert f"{file} was renamed to run.pt.broken, since it is not as it was written" in capsys.readouterr().err
        assert (tmp_path / "run.pt.broken").read_bytes() == changed and file.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.inf}, "expected lr to be a finite number > 0, got inf"),
        ({"lr": math.nan}, "expected lr to be a finite number > 0, got nan"),
        ({"lr": 0.0}, "expected lr to be a finite number > 0, got 0.0"),
        ({"clip": -1.0}, "expected clip to be a finite number >= 0, got -1.0"),
        ({"warmup": -0.1}, "expected warmup to be a finite number >= 0 and < 1, got -0.1"),
        ({"warmup": 1.0}, "expected warmup to be a finite number >= 0 and < 1, got 1.0"),
        ({"momentum": 1.0}, "expected momentum to be a finite number >= 0 and < 1, got 1.0"),
        ({"weight_decay": -1e-4}, "expected weight_decay to be a finite number >= 0, got -0.0001"),
        ({"batch_size": 0}, "expected batch_size to be an integer >= 1, got 0"),
        ({"patience": 0, "validate": spread}, "expected patience to be an integer >= 1 or None, got 0"),
        ({"patience": 3}, "expected validate with patience, got patience 3 alone"),
        ({"tensors": (255 * X, Y)}, r"pixels must be finite and in \[0, 1\]"),
        ({"tensors": ((255 * X).byte(), Y)}, "images must be a? ?floating-point NCHW.*got .*torch.uint8"),
        ({"tensors": (X.where(X > 0.5, math.nan), Y)}, "pixels must be finite"),
        ({"tensors": (X, Y.float() / 0)}, "expected finite numbers, got NaN or infinity in training tensor 1"),
        ({"tensors": (X, Y + 1)}, r"expected labels of type int64 in \[0, 9\], got torch.int64 in \[1, 10\]"),
        ({"tensors": (X, Y - 1)}, r"expected labels of type int64 in \[0, 9\], got torch.int64 in \[-1, "),
        ({"tensors": (X, Y.int())}, r"expected labels of type int64 in \[0, 9\], got torch.int32"),
        ({"tensors": (X, Y.float())}, r"expected labels of type int64 in \[0, 9\], got torch.float32"),
        ({"validate": lambda m: math.nan}, "train: validate's score to be a finite number, got nan"),
        ({"validate": lambda m: None}, "train: validate's score to be a finite number, got None"),
        ({"validate": lambda m: "0.5"}, "train: validate's score to be a finite number, got '0.5'"),
        ({"loss": lambda m, x, y, **_: (m(x), {})}, r"expected loss to return .*, got shape \(16, 10\)"),
        ({"loss": lambda m, x, y, **_: m(x).sum()}, "expected loss to return .*, got no dict"),
        ({"loss": lambda m, x, y, **_: (1.0, {})}, "expected loss to return .*, got float"),
        ({"loss": lambda m, x, y, **_: (m(x).sum().detach(), {})}, "expected a loss with a gradient, got none"),
    ],
)
def test_fault_44_numbers_of_a_training_out_of_range_are_refused(options, message):
    call = {"loss": hard_label_loss, "tensors": (X, Y), "epochs": 1} | options
    with pytest.raises(ValueError, match=message) as error:
        quiet(fresh(), call.pop("loss"), call.pop("tensors"), **call)
    assert "\n" not in str(error.value)


def test_fault_44_weights_that_are_not_finite_after_the_last_step_are_refused():
    with pytest.raises(FloatingPointError, match="expected a finite loss, got weights that are not in epoch 0"):
        train(fresh(), hard_label_loss, (X, Y), epochs=1, batch_size=50, lr=1e300, optimizer="sgd", progress=False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fault_24_precision_is_free_after_and_beside_other_uses_of_accelerate(precision):
    """In a process of its own: a user's Accelerator, which is the whole process's, and trainings in any order."""
    code = (
        DEFAULT_RUN
        + f"""
from accelerate import Accelerator
for other in ("no", "{precision}", "no"):
    train(model, hard_label_loss, (x, y), epochs=1, precision=other, progress=False)
Accelerator(mixed_precision="{precision}", cpu=True)
model = build_classifier("cnn", width=4, dropout=0.3, seed=0)
with torch.autocast("cpu", torch.bfloat16):
    run = train(model, hard_label_loss, (x, y), epochs=2, lr=1e-2, batch_size=16, progress=False)
print(run.history[-1]["loss"].hex(), sum(v.double().sum().item() for v in run.last.values()).hex())
"""
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-500:]
    assert len(set(out.stdout.strip().splitlines())) == 1


def test_weights_of_one_step_are_not_those_of_the_next_within_a_callers_autocast():
    runs = []
    for outer in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            runs.append(quiet(fresh(), hard_label_loss, (X, Y), epochs=2, lr=1e-2, precision="bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        pass  # clears the cache
    assert same(runs[0].last, runs[1].last) and runs[0].history == runs[1].history


def test_a_forward_of_a_models_own_is_there_after_mixed_precision():
    model = fresh()
    own = model.forward = lambda x, forward=model.forward: forward(x) * 2
    quiet(model, hard_label_loss, (X, Y), epochs=1, precision="bf16")
    assert model.forward is own


RANKS = """
import sys, torch
from torch import nn
from lib import training
torch.set_num_threads(1)
class Killed(Exception): pass
def loss(model, x, *, generator, epoch):
    noise = torch.rand(len(x), generator=generator)
    return (model(x)[:, 0] - noise).square().mean(), {"noise": noise.mean(), "dropped": model(x).mean().item()}
def run(file, kill):
    torch.manual_seed(0)
    model, save, calls = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), training.save_state, []
    def saving(*rest):
        save(*rest)
        calls.append(1)
        if len(calls) == kill:
            raise Killed
    training.save_state = saving
    try:
        data, options = torch.rand(32, 2), {"epochs": 4, "batch_size": 8, "progress": False}
        result = training.train(model, loss, (data,), checkpoint=file, **options)
        return result.history[2:], model.state_dict()["0.weight"].tolist()
    except Killed:
        return None
    finally:
        training.save_state = save
folder = sys.argv[1]
whole = run(folder + "/whole.pt", 0)
assert run(folder + "/part.pt", 2) is None
assert run(folder + "/part.pt", 0) == whole, "another noise"
torch.distributed.destroy_process_group()
"""


def test_every_process_goes_on_with_its_own_noise(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    shared |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path)],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-800:]
