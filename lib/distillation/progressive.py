"""Progressive distillation (Salimans and Ho 2022): each student takes in one step what its teacher takes in two.

The deterministic DDIM path from t* to the clean image is halved again and again, 64 → 32 → … → 1 steps; each round's
student is the next round's teacher.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib.diffusion.network import eps_model
from lib.diffusion.schedule import EpsModel, Level, Time, alpha_sigma, time_grid, to_model_range
from lib.diffusion.solvers import ddim_step
from lib.training import Trained, train

SNR_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # of the signal-to-noise ratio α² / s², for the loss on x
    "uniform": torch.ones_like,
    "truncated": lambda snr: snr.clamp(min=1),  # bites where σ > 1 only: never below t* = 0.1, where the SNR is 8.7
    "snr+1": lambda snr: snr + 1,  # the plain loss on v
    "capped": lambda snr: (snr + 1).clamp(max=20),
}


def two_step_target(predict: EpsModel, z: Tensor, now: Time, middle: Time, then: Time) -> Tensor:
    """Returns the x for which one DDIM step from `now` to `then` ends where the teacher's two steps end (appendix G).

    x = (z″ − (s″ / s) z) / (α″ − (s″ / s) α), where z″ is what two steps by way of `middle` make of z.
    """
    first, second, third = alpha_sigma(now), alpha_sigma(middle), alpha_sigma(then)
    half = ddim_step(z, predict(z, now), first, second)
    end = ddim_step(half, predict(half, middle), second, third)
    ratio = third[1] / first[1]
    return (end - ratio * z) / (third[0] - ratio * first[0])


def predicted_image(z: Tensor, eps: Tensor, at: Level) -> Tensor:
    """Returns the image in z when its noise is `eps`."""
    return (z - at[1] * eps) / at[0]


def progressive_loss(teacher: EpsModel, steps: int, *, t: float, target: str = "v", weight: str = "snr+1") -> Callable:
    """Returns the loss of a student of `steps` steps from t to the clean image, for `lib.training` on images in [0, 1].

    `teacher`: predicts noise, asked at the 2 `steps` levels of its own grid, without gradient; `target`: what the
    student's network says; `weight`: one of `SNR_WEIGHTS`. Raises ValueError for an unknown weight.
    """
    if weight not in SNR_WEIGHTS:
        raise ValueError(f"unknown weight {weight!r}: choose one of {', '.join(SNR_WEIGHTS)}")
    fine = torch.tensor(time_grid(t, 2 * steps))

    def loss(net: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        u = to_model_range(x)
        k = torch.randint(0, steps, (len(x),), generator=generator, device=x.device)
        now, middle, then = (fine.to(x)[2 * k + j] for j in range(3))
        at = alpha_sigma(now)
        z = at[0] * u + at[1] * torch.randn(x.shape, generator=generator, device=x.device)
        with torch.no_grad():
            wanted = two_step_target(teacher, z, now, middle, then)
        found = predicted_image(z, eps_model(net, target)(z, now), at)
        return (SNR_WEIGHTS[weight]((at[0] / at[1]) ** 2) * (wanted - found).square()).mean(), {}

    return loss


def student_steps(first: int) -> list[int]:
    """Returns the students' numbers of steps: half of `first`, and on to 1; ValueError unless a power of 2 above 1."""
    if first < 2 or first & (first - 1):
        raise ValueError(f"{first} steps cannot be halved down to 1: a power of 2 above 1 is due")
    return [first >> k for k in range(1, first.bit_length())]


def progressive_distillation(
    teacher: nn.Module,
    tensors: tuple[Tensor, ...],
    counts: Sequence[int],
    *,
    t: float,
    target: str = "v",
    weight: str = "snr+1",
    keep: Callable[[int, nn.Module, list[dict]], Any] | None = None,
    validate: Callable[[int, nn.Module], float] | None = None,
    known: Callable[[int], nn.Module | None] | None = None,
    **options: Any,
) -> tuple[dict[int, nn.Module], dict[int, Trained]]:
    """Returns one student per entry of `counts` (see `student_steps`) and how its training went.

    Each begins with its teacher's weights. `keep(steps, student, history)` is called after each round, to save it; a
    round for which `known(steps)` returns a network is not trained again: an interrupted ladder goes on where it was.
    `validate(steps, student)`: a score that chooses the epoch; `options`: those of `lib.training.train`.
    """
    students: dict[int, nn.Module] = {}
    found: dict[int, Trained] = {}
    for steps in counts:
        student = known(steps) if known else None
        if student is None:
            student = copy.deepcopy(teacher)
            told = eps_model(teacher.eval(), target)
            loss = progressive_loss(told, steps, t=t, target=target, weight=weight)
            score = partial(validate, steps) if validate else None
            found[steps] = train(student, loss, tensors, validate=score, **{"name": f"{steps} steps"} | options)
            if keep:
                keep(steps, student, found[steps].history)
        students[steps] = teacher = student.eval()
    return students, found
