"""The one loop: schedules, averaging, early stop, resuming, seeding, precision, clear failures."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, ema):
    noisy = partial(shift_flip, pad=1, flip=True)
    options = {"epochs": 5, "lr": 1e-2, "ema": ema, "augment": noisy}
    scores = [0.1, 0.5, 0.3, 0.2, 0.4]

    def validation(stop_at: int | None = None, start: int = 0):
        calls = iter(range(start, 5))

        def validate(model):
            if (i := next(calls)) == stop_at:
                raise Interrupted
            return scores[i]

        return validate

    whole = quiet(fresh(), hard_label_loss, (X, Y), validate=validation(), **options)
    file = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        quiet(fresh(), hard_label_loss, (X, Y), validate=validation(3), checkpoint=file, **options)
    resumed = quiet(fresh(), hard_label_loss, (X, Y), validate=validation(start=3), checkpoint=file, **options)
    assert same(whole.last, resumed.last) and same(whole.best, resumed.best)
    assert whole.history == resumed.history and resumed.best_epoch == 1
    foreign = quiet(fresh(), hard_label_loss, (X, Y), checkpoint=file, epochs=2, lr=1e-2)
    assert len(foreign.history) == 2  # another setting: the old checkpoint is not its own


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
        ({"optimizer": "adma"}, "expected optimizer to be one of adam, adamw, sgd, got 'adma'"),
        ({"schedule": "linear"}, "expected schedule to be one of constant, cosine, step, got 'linear'"),
        ({"precision": "fp8"}, "expected precision to be one of no, fp16, bf16, got 'fp8'"),
        ({"epochs": 0}, "expected epochs above 0, got 0"),
        ({"ema": 1.0}, r"expected ema in \[0, 1\).*, got 1.0"),
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

    def validate(stop: int | None, start: int = 0):
        calls = iter(range(start, 3))

        def score(model):
            if next(calls) == stop:
                raise Interrupted
            return 0.0

        return score

    whole = quiet(fresh(), hard_label_loss, (X, Y), validate=validate(None), **options)
    with pytest.raises(Interrupted):
        quiet(fresh(), hard_label_loss, (X, Y), validate=validate(2), checkpoint=file, **options)
    scale = torch.load(file, weights_only=True)["scaler"]["_growth_tracker"]
    assert scale == 8  # steps since the scale last changed: two epochs of four
    resumed = quiet(fresh(), hard_label_loss, (X, Y), validate=validate(None, 2), checkpoint=file, **options)
    assert same(whole.last, resumed.last)
