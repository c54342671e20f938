"""Experiment 1, classic knowledge distillation (Hinton, Vinyals, Dean 2015): trainings and measurements."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.data import Data, Split
from lib.distillation.soft_targets import classic_loss, hard_label_smoothing_loss
from lib.experiments.samples import answer_outcome
from lib.models import build_classifier, count_parameters, logit_accuracy, most_likely, predict_logits
from lib.training import hard_label_loss, train
from lib.utils import parallel
from lib.utils.augmentation import shift_flip
from lib.utils.device import to_model_device
from lib.utils.draws import NO_ATTACK
from lib.utils.record_keys import run_key


def train_teachers(
    data: Data,
    seed: int,
    *,
    arch: str,
    width: int,
    members: int,
    epochs: int,
    lr: float,
    shift: int,
    dropout: float = 0.0,
    jobs: int = 1,
) -> list[nn.Module]:
    """Train `members` wide networks on all labels, with images shifted by up to `shift` pixels.

    They differ by their initial weights and batches alone; the epoch is chosen by validation accuracy. `jobs`: see
    `lib.utils.parallel`.
    """

    def train_one(member: int) -> nn.Module:
        own = 1000 * member + seed
        model = build_classifier(arch, **data.spec(), width=width, dropout=dropout, seed=own)
        train(
            model,
            hard_label_loss,
            (data.train.x, data.train.y),
            epochs=epochs,
            lr=lr,
            augment=partial(shift_flip, pad=shift, flip=False) if shift else None,
            validate=lambda m: logit_accuracy(predict_logits(m, data.val.x), data.val.y),
            seed=own,
            progress=jobs == 1,
            name=f"teacher {member + 1}/{members}",
        )
        return model

    return parallel.parallel_map(
        train_one, [(member,) for member in range(members)], jobs, "teachers", progress=jobs > 1
    )


def train_student(
    data: Data,
    seed: int,
    loss: Callable,
    tensors: tuple[Tensor, ...],
    *,
    width: int,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
) -> nn.Module:
    """Train a small CNN for `steps` steps on `tensors`; one seed gives every loss the same init and batches."""
    model = build_classifier("cnn", **data.spec(), width=width, seed=seed)
    epochs = max(1, round(steps / math.ceil(len(tensors[0]) / batch_size)))
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "progress": False,
    }
    train(model, loss, tensors, epochs=epochs, optimizer="adamw", **options)
    return model


def train_hard_and_soft(
    split: Split, z_t: Tensor, fit: Callable, *, T: float, alpha: float, jobs: int = 1
) -> dict[str, nn.Module]:
    """Train two students on the same images: one on the labels, one on the teacher's logits `z_t` as well.

    `fit(loss, tensors)` trains one student; `jobs`: see `lib.utils.parallel`.
    """
    calls = {"hard": (hard_label_smoothing_loss(), (*split,)), "soft": (classic_loss(T, alpha), (*split, z_t))}
    return dict(zip(calls, parallel.parallel_map(fit, list(calls.values()), jobs, progress=False), strict=True))


def grid_search(data: Data, trials: dict[tuple, Callable[[], nn.Module]], jobs: int = 1) -> dict:
    """Train every trial, choose one by validation accuracy (the first of equals) and report its test accuracy.

    The result holds `grid` (per row: trial, validation and test accuracy in [0, 1]), `chosen`, `val` and `test`, and
    `outcomes`: which test images each trial classifies correctly, in the order of `grid`.
    """

    def scores(fit: Callable[[], nn.Module]) -> tuple[list[float], dict[str, Any]]:
        model = fit()
        z = [predict_logits(model, split.x) for split in (data.val, data.test)]
        accuracies = [logit_accuracy(z[0], data.val.y), logit_accuracy(z[1], data.test.y)]
        return accuracies, answer_outcome(z[1], data.test.y)

    results = parallel.parallel_map(scores, [(fit,) for fit in trials.values()], jobs, "trials")
    grid = [[*trial, *each] for trial, (each, _) in zip(trials, results, strict=True)]
    best = max(range(len(grid)), key=lambda i: grid[i][-2])
    chosen = {"chosen": list(grid[best][:-2]), "val": grid[best][-2], "test": grid[best][-1]}
    return {"grid": grid} | chosen | {"outcomes": [outcome for _, outcome in results]}


def class_relations(z: Float[Tensor, "n k"], y: Int[Tensor, " n"], T: float) -> Float[Tensor, "k k"]:
    """Return, for each true class (row), the distribution of the remaining probability over the other classes.

    Rows: mean of softmax(z/T) over the images of the class, without the class itself, summing to 1; the diagonal is 0.
    """
    p = (z.double() / T).softmax(1)
    k = z.shape[1]
    relations = torch.stack([p[y == c].mean(0) for c in range(k)])
    relations.fill_diagonal_(0)
    return relations / relations.sum(1, keepdim=True)


def class_similarity(x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> Float[Tensor, "k k"]:
    """Return minus the distance between the mean images of each two classes: a similarity without any network."""
    means = torch.stack([x[y == c].double().mean(0).flatten() for c in range(int(y.max()) + 1)])
    return -torch.cdist(means, means)


def rank_correlation(a: Float[Tensor, "k k"], b: Float[Tensor, "k k"]) -> float:
    """Return Spearman's ρ of two class-relation matrices over the k (k − 1)/2 pairs, each made symmetric first."""
    pairs = torch.triu_indices(len(a), len(a), 1)
    return float(scipy.stats.spearmanr(*((m + m.T)[pairs[0], pairs[1]].numpy() for m in (a, b))).statistic)


def prior_bias(z: Float[Tensor, "n k"], c: int, prior: float) -> float:
    """Return the b for which the mean of softmax(z + b e_c) gives class c the mass `prior` in (0, 1).

    Hinton et al. 2015 (section 3) raised the bias of the class that the transfer set lacks until the *test* errors were
    fewest; matching a known prior on training images needs neither test set nor labels.
    """
    if not 0 < prior < 1:
        raise ValueError(f"expected a prior in (0, 1), got {prior}")
    z = z.double()
    others = torch.cat([z[:, :c], z[:, c + 1 :]], 1).logsumexp(1)

    def excess(b: float) -> float:
        return torch.sigmoid(z[:, c] + b - others).mean().item() - prior

    reach = float((others - z[:, c]).abs().max()) + abs(math.log(prior / (1 - prior))) + 1
    return scipy.optimize.brentq(excess, -reach, reach)


def bias_tuned_on_test(z: Float[Tensor, "n k"], y: Int[Tensor, " n"], c: int) -> float:
    """Return the bias of class c with the fewest errors on the images of the evaluation itself, as in the paper."""
    others = torch.cat([z[:, :c], z[:, c + 1 :]], 1).max(1).values
    thresholds = (others - z[:, c]).double().sort().values
    candidates = torch.cat([thresholds[:1] - 1, (thresholds[1:] + thresholds[:-1]) / 2, thresholds[-1:] + 1])
    errors = [1 - logit_accuracy(add_class_bias(z, c, b), y) for b in candidates.tolist()]
    return candidates[int(np.argmin(errors))].item()


def add_class_bias(z: Float[Tensor, "n k"], c: int, b: float) -> Float[Tensor, "n k"]:
    """Return logits with `b` added to class c."""
    z = z.double().clone()
    z[:, c] += b
    return z


def omitted_class(data: Data, model: nn.Module, c: int) -> dict[str, dict[str, Any]]:
    """Return test errors, errors on class c and its recall, without a bias, with the prior's and the test set's.

    The prior is the share of class c in the train split and is matched on its images: no other label is used. Under
    `outcomes`: which test images are classified correctly.
    """
    z_train, z = predict_logits(model, data.train.x), predict_logits(model, data.test.x)
    share = (data.train.y == c).double().mean().item()
    biases = {"none": 0.0, "prior": prior_bias(z_train, c, share), "test-tuned": bias_tuned_on_test(z, data.test.y, c)}
    report = {}
    for name, b in biases.items():
        shifted = add_class_bias(z, c, b)
        wrong = most_likely(shifted) != data.test.y
        of_class = data.test.y == c
        report[name] = {
            "bias": b,
            "errors": int(wrong.sum()),
            "errors_on_class": int(wrong[of_class].sum()),
            "recall": 1 - wrong[of_class].double().mean().item(),
            "accuracy": 1 - wrong.double().mean().item(),
            "outcomes": answer_outcome(shifted, data.test.y),
        }
    return report


def ambiguous_images(z: Float[Tensor, "n k"], y: Int[Tensor, " n"], T: float, count: int) -> list[dict]:
    """Return the `count` correctly classified images with the most probable second class, and that class."""
    p = (z / T).softmax(1)
    top = p.topk(2).indices
    second = torch.where(top[:, 0] == y, p.gather(1, top[:, 1:]).squeeze(1), -1.0)
    rows = second.topk(count).indices.tolist()
    return [{"row": i, "label": int(y[i]), "second": int(top[i, 1]), "p": second[i].item()} for i in rows]


@torch.no_grad()
def network_cost(model: nn.Module, x: Float[Tensor, "n c h w"]) -> dict[str, float]:
    """Count a network's parameters, KiB of weights, and KiB of all layers' outputs for one image."""
    size = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal size
        size += output.numel() * output.element_size()

    model.eval()
    hooks = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    model(*to_model_device(model, x[:1]))
    for hook in hooks:
        hook.remove()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return {"parameters": count_parameters(model), "weights_kib": weights / 1024, "activations_kib": size / 1024}


@torch.no_grad()
def network_latency(model: nn.Module, x: Float[Tensor, "n c h w"]) -> dict[str, float]:
    """Measure milliseconds per image, for one image alone and in the batch `x`: medians of 30 calls after 5 more."""
    model.eval()
    (x,), clock = to_model_device(model, x), {}
    for name, batch in (("ms, one image", x[:1]), (f"ms per image, batch {len(x)}", x)):
        times = []
        for _ in range(35):
            begin = time.perf_counter()
            model(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        clock[name] = 1e3 * float(np.median(times[5:])) / len(batch)
    return clock


def label_count_names(counts: Sequence[int]) -> list[str]:
    """Return the keys of results on `counts` labels: the number, or `all` for 0."""
    return [str(n) if n else "all" for n in counts]


def classic_outcomes(
    data: Data,
    networks: Mapping[str, nn.Module],
    students: Mapping[str, Mapping[str, nn.Module]],
    grids: Mapping[str, dict],
    left_out: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return which test images each network classifies correctly: network → condition → packed answers.

    The networks are `teacher` and the others of `networks` by name; `hard/100`, the student on the labels of 100
    images; `tuned/soft`, the trial that validation chose; `sweep/soft/4/0.9`, each trial; `omitted/soft`, the student
    that never saw a class, with the bias as condition beside `clean`. The outcomes are removed from `grids` and
    `left_out`, which go into the metrics.
    """
    everyone = dict(networks) | {run_key(kind, n): m for n, pair in students.items() for kind, m in pair.items()}
    out = {
        name: {NO_ATTACK: answer_outcome(predict_logits(m, data.test.x), data.test.y)} for name, m in everyone.items()
    }
    for kind, grid in grids.items():
        trials = [(row[:-2], outcome) for row, outcome in zip(grid["grid"], grid.pop("outcomes"), strict=True)]
        out |= {run_key("sweep", kind, *trial): {NO_ATTACK: outcome} for trial, outcome in trials}
        out[run_key("tuned", kind)] = out[run_key("sweep", kind, *grid["chosen"])]
    for kind in students[next(iter(students))]:
        answers = {bias: row.pop("outcomes") for bias, row in left_out[kind].items()}
        out[run_key("omitted", kind)] = {NO_ATTACK if bias == "none" else bias: bits for bias, bits in answers.items()}
    return out
