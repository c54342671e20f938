"""Experiment 1's measurements against cases worked by hand."""

import math

import pytest
import torch

from lib.data import load_dataset
from lib.distillation.soft_targets import classic_loss, hard_label_smoothing_loss
from lib.experiments import kd
from lib.models import build_classifier, logit_accuracy, predict_logits
from lib.utils.draws import unpack_draws


def test_class_relations_by_hand():
    z = torch.tensor([[5.0, math.log(3), 0.0], [0.0, 4.0, 0.0], [0.0, math.log(3), 9.0]])
    relations = kd.class_relations(z, torch.tensor([0, 1, 2]), 1.0)
    expected = torch.tensor([[0, 0.75, 0.25], [0.5, 0, 0.5], [0.25, 0.75, 0]], dtype=torch.float64)
    torch.testing.assert_close(relations, expected, atol=1e-6, rtol=0)


def test_rank_correlation_is_one_for_the_same_order_and_minus_one_for_its_reverse():
    a = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = a + a.T
    assert kd.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert kd.rank_correlation(a, -a) == pytest.approx(-1)


def test_similarity_of_classes_whose_means_are_known():
    x = torch.zeros(4, 1, 1, 2)
    x[:, 0, 0] = torch.tensor([[0.0, 0.0], [0.0, 0.2], [0.3, 0.1], [0.3, 0.1]])
    similarity = kd.class_similarity(x, torch.tensor([0, 0, 1, 1]))
    assert similarity[0, 1].item() == pytest.approx(-0.3, abs=1e-6)


@pytest.mark.parametrize("prior", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_prior_bias_gives_the_class_its_mass(prior, scale):
    z = scale * torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    b = kd.prior_bias(z, 2, prior)
    assert kd.add_class_bias(z, 2, b).softmax(1)[:, 2].mean().item() == pytest.approx(prior, abs=1e-6)
    with pytest.raises(ValueError, match=r"expected a prior in \(0, 1\), got 1.0"):
        kd.prior_bias(z, 2, 1.0)


def test_bias_tuned_on_test_is_the_best_of_a_fine_grid():
    g = torch.Generator().manual_seed(1)
    z, y = torch.randn(200, 4, generator=g), torch.randint(4, (200,), generator=g)
    best = logit_accuracy(kd.add_class_bias(z, 1, kd.bias_tuned_on_test(z, y, 1)), y)
    grid = max(logit_accuracy(kd.add_class_bias(z, 1, b), y) for b in torch.linspace(-8, 8, 3001).tolist())
    assert best >= grid


def test_ambiguous_images_are_right_and_sorted():
    z = torch.tensor([[2.0, 1.9, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.2, 0.0]])
    shown = kd.ambiguous_images(z, torch.tensor([0, 0, 1, 0]), 1.0, count=3)  # the fourth is misclassified
    assert [(s["row"], s["second"]) for s in shown] == [(0, 1), (2, 2), (1, 1)]
    assert shown[0]["p"] == pytest.approx(torch.tensor([2.0, 1.9, 0.0]).softmax(0)[1].item())


def test_sweep_chooses_on_validation_and_never_on_test():
    data = load_dataset("digits")

    class Fixed(torch.nn.Module):
        """Right on validation only, or on test only."""

        def __init__(self, right: torch.Tensor):
            super().__init__()
            self.right = right

        def forward(self, x):
            y = (data.val if len(x) == len(data.val.y) else data.test).y
            mine = torch.equal(y, self.right)
            return 5.0 * torch.nn.functional.one_hot(y if mine else (y + 1) % 10, 10).float()

    trials = {("test",): lambda: Fixed(data.test.y), ("val",): lambda: Fixed(data.val.y)}
    report = kd.grid_search(data, trials)
    assert report["chosen"] == ["val"] and (report["val"], report["test"]) == (1.0, 0.0)
    assert [unpack_draws(bits).mean() for bits in report["outcomes"]] == [1.0, 0.0]


def test_outcomes_of_every_network_are_its_accuracies():
    data = load_dataset("digits", n_labels=60)

    def fit(steps):
        return kd.train_student(
            data, 0, hard_label_smoothing_loss(), tuple(data.train), width=4, steps=steps, batch_size=20, lr=1e-2
        )

    pairs = {"60": {"soft": fit(30), "hard": fit(3)}}
    grids = {kind: kd.grid_search(data, {(4.0, 0.9): lambda: pairs["60"]["hard"]}) for kind in ("soft", "hard")}
    left_out = {kind: kd.omitted_class(data, model, 3) for kind, model in pairs["60"].items()} | {"class": 3}
    correct = kd.classic_outcomes(data, {"teacher": pairs["60"]["soft"]}, pairs, grids, left_out)
    share = {(name, c): unpack_draws(bits).mean() for name, each in correct.items() for c, bits in each.items()}
    scores = {kind: logit_accuracy(predict_logits(m, data.test.x), data.test.y) for kind, m in pairs["60"].items()}
    assert scores["soft"] != scores["hard"]
    assert share["soft/60", "clean"] == share["teacher", "clean"] == pytest.approx(scores["soft"])
    assert share["tuned/soft", "clean"] == share["sweep/hard/4/0.9", "clean"] == pytest.approx(scores["hard"])
    for bias in ("prior", "test-tuned"):
        assert share["omitted/soft", bias] == pytest.approx(left_out["soft"][bias]["accuracy"])
    assert share["omitted/hard", "clean"] == pytest.approx(left_out["hard"]["none"]["accuracy"])
    assert "outcomes" not in grids["soft"] and "outcomes" not in left_out["soft"]["prior"]


def test_an_answer_that_is_not_finite_is_an_error_under_every_bias(monkeypatch):
    data = load_dataset("digits", n_labels=60)
    broken = data.test.y == 0  # NaN's argmax would be their class

    def answers(model, x):
        y = data.test.y if len(x) == len(data.test.y) else data.train.y
        z = 5.0 * torch.nn.functional.one_hot(y, 10).float()
        return z.masked_fill(broken[:, None], torch.nan) if y is data.test.y else z

    monkeypatch.setattr(kd, "predict_logits", answers)  # which itself refuses such answers
    for row in kd.omitted_class(data, torch.nn.Identity(), 0).values():
        assert row["errors"] >= int(broken.sum()) == row["errors_on_class"] and row["recall"] == 0
        assert unpack_draws(row["outcomes"]).mean() == pytest.approx(row["accuracy"])


def test_students_share_start_and_batches_and_the_cost_is_counted():
    data = load_dataset("digits", n_labels=20)
    fit = {"width": 4, "steps": 2, "batch_size": 20, "lr": 1e-9}
    seen = []

    def loss(model, x, y, *, generator, epoch):
        seen.append(x)
        return (model(x) ** 2).mean(), {}

    for _ in range(2):
        kd.train_student(data, 5, loss, tuple(data.train), **fit)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    z = torch.zeros(20, 10)
    model = kd.train_student(data, 5, classic_loss(1.0, 1.0), (*data.train, z), **fit)
    torch.testing.assert_close(
        model.state_dict(), build_classifier("cnn", width=4, seed=5).state_dict(), atol=1e-6, rtol=0
    )
    sizes, clock = kd.network_cost(model, data.test.x), kd.network_latency(model, data.test.x[:8])
    assert sizes["parameters"] == 1626 and sizes["weights_kib"] == pytest.approx((1626 + 2) * 4 / 1024)
    outputs = 64 + 2 * 4 * 64 + 2 * 8 * 16 + 128 + 128 + 10  # normalised, two conv + ReLU, flattened, dropout, logits
    assert sizes["activations_kib"] == pytest.approx(outputs * 4 / 1024)
    assert all(ms > 0 for ms in clock.values())
