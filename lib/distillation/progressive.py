"""Progressive distillation (Salimans and Ho 2022): each student takes in one step what its teacher takes in two.

The number of steps of the deterministic DDIM path from t* to the clean image is divided by two again and again,
64 → 32 → … → 1; each student is the next one's teacher.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib.diffusion.network import check_target, eps_model
from lib.diffusion.schedule import EpsModel, Index, Level, Time, alpha_sigma, subtract, time_grid, to_model_range
from lib.diffusion.solvers import ddim_step
from lib.training import Trained, train
from lib.utils.validation import Integer, PositiveInt, check_settings

SNR_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # of the signal-to-noise ratio α² / s², for the loss on x
    "uniform": torch.ones_like,
    "truncated": lambda snr: snr.clamp(min=1),  # bites where σ > 1 only: never below t* = 0.1, where the SNR is 8.7
    "snr+1": lambda snr: snr + 1,  # the plain loss on v
    "capped": lambda snr: (snr + 1).clamp(max=20),
}


def two_step_target(teacher: EpsModel, z: Tensor, t: Time, t_mid: Time, t_next: Time) -> Tensor:
    """Return the x̃ for which one DDIM step from t ends where the teacher's two steps end (Salimans and Ho, app. G).

    x̃ = (z″ − (s″ / s) z) / (α″ − (s″ / s) α), where z″ is z after the teacher's steps to t_mid and t_next.

    Args:
        teacher: the noise that it predicts in z at index t.
        z: noisy images (n, c, h, w) at level t.
        t: index, one for all or one per image (n,).
        t_mid: index after the teacher's first step.
        t_next: index after its second.

    Returns:
        Images (n, c, h, w) in [-1, 1], not clamped.
    """
    level, level_mid, level_next = alpha_sigma(t), alpha_sigma(t_mid), alpha_sigma(t_next)
    z_mid = ddim_step(z, teacher(z, t), level, level_mid)
    z_next = ddim_step(z_mid, teacher(z_mid, t_mid), level_mid, level_next)
    ratio = level_next[1] / level[1]
    return (z_next - ratio * z) / (level_next[0] - ratio * level[0])


def predicted_image(z: Tensor, eps_hat: Tensor, level: Level) -> Tensor:
    """Return the image that a noise prediction implies: x = (z − s ε̂) / α.

    Args:
        z: noisy images (n, c, h, w).
        eps_hat: predicted noise (n, c, h, w).
        level: (α, s) of z.

    Returns:
        Images (n, c, h, w) in [-1, 1], not clamped.
    """
    return (z - level[1] * eps_hat) / level[0]


def progressive_loss(
    teacher: EpsModel, steps: PositiveInt, *, t: Index, target: str = "v", weight: str = "snr+1"
) -> Callable:
    """Return the loss w(SNR) ‖x̂ − x̃‖² of a student of `steps` steps (Salimans and Ho 2022, algorithm 2).

    Args:
        teacher: the noise that it predicts in z, on its own grid of 2 `steps` steps, without gradient.
        steps: of the student, from t to the clean image.
        t: t*, index where the path begins.
        target: what the student's network predicts, one of `lib.diffusion.network.PREDICTION_TARGETS`.
        weight: w, one of `SNR_WEIGHTS`.

    Returns:
        A loss for `lib.training.train` on images in [0, 1].

    Raises:
        ValueError: for an unknown weight or target, and for numbers out of range.
    """
    if weight not in SNR_WEIGHTS:
        raise ValueError(f"expected a weight among {', '.join(SNR_WEIGHTS)}, got {weight!r}")
    check_target(target)
    steps = check_settings(progressive_loss, {"steps": steps, "t": t})["steps"]
    times = torch.tensor(time_grid(t, 2 * steps))

    def loss(net: nn.Module, x: Tensor, *_: Tensor, generator: torch.Generator, epoch: int):
        u, grid = to_model_range(x), times.to(x)
        k = torch.randint(0, steps, (len(x),), generator=generator, device=x.device)
        t_k, t_mid, t_next = (grid[2 * k + j] for j in range(3))
        alpha_t, s_t = alpha_sigma(t_k)
        z = alpha_t * u + s_t * torch.randn(x.shape, generator=generator, device=x.device)
        with torch.no_grad():
            x_tilde = two_step_target(teacher, z, t_k, t_mid, t_next)
        x_hat = predicted_image(z, eps_model(net, target)(z, t_k), (alpha_t, s_t))
        return (SNR_WEIGHTS[weight]((alpha_t / s_t) ** 2) * subtract(x_tilde, x_hat).square()).mean(), {}

    return loss


def student_steps(first: Integer) -> list[int]:
    """Return the students' numbers of steps.

    Args:
        first: steps of the first teacher, a power of 2 above 1.

    Returns:
        Half of `first`, and so on down to 1.

    Raises:
        ValueError: for another number.
    """
    first = check_settings(student_steps, {"first": first})["first"]
    if first < 2 or first & (first - 1):
        raise ValueError(f"expected a power of 2 above 1, since it is divided by two down to 1 step, got {first}")
    return [first >> k for k in range(1, first.bit_length())]


def progressive_distillation(
    teacher: nn.Module,
    tensors: tuple[Tensor, ...],
    counts: Sequence[int],
    *,
    t: float,
    target: str = "v",
    weight: str = "snr+1",
    save: Callable[[int, nn.Module, list[dict]], Any] | None = None,
    load: Callable[[int], nn.Module | None] | None = None,
    validate: Callable[[int, nn.Module], float] | None = None,
    **options: Any,
) -> tuple[dict[int, nn.Module], dict[int, Trained]]:
    """Distil a diffusion model into students of fewer and fewer steps (Salimans and Ho 2022, algorithm 2).

    Each student begins with its teacher's weights.

    Args:
        teacher: a diffusion network.
        tensors: training images (n, c, h, w) in [0, 1], first.
        counts: numbers of steps, falling, see `student_steps`.
        t: t*, index where the path begins.
        target: what the networks predict, one of `lib.diffusion.network.PREDICTION_TARGETS`.
        weight: of the loss, one of `SNR_WEIGHTS`.
        save: called with steps, student and history after each training.
        load: called with steps; a network that it returns is not trained again, so that an interrupted run goes on.
        validate: a score of (steps, student), higher is better, that chooses the epoch.
        **options: those of `lib.training.train`.

    Returns:
        The students by number of steps, in eval mode, and the trainings of those that were trained.

    Raises:
        ValueError: for an unknown weight or target.

    Examples:
        A student of one step of a tiny teacher, which is untrained here:

        >>> import torch
        >>> from lib.diffusion.network import build_unet
        >>> teacher = build_unet(1, 8, (8, 8), seed=0)
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> students, trained = progressive_distillation(
        ...     teacher, (images,), student_steps(2), t=99, epochs=1, batch_size=16, lr=1e-3, progress=False
        ... )
        >>> list(students), len(trained[1].history)
        ([1], 1)
    """
    students: dict[int, nn.Module] = {}
    trainings: dict[int, Trained] = {}
    for steps in counts:
        student = load(steps) if load else None
        if student is None:
            student = copy.deepcopy(teacher)
            loss = progressive_loss(eps_model(teacher.eval(), target), steps, t=t, target=target, weight=weight)
            score = partial(validate, steps) if validate else None
            named: dict[str, Any] = {"name": f"{steps} steps"} | options
            trainings[steps] = train(student, loss, tensors, validate=score, **named)
            if save:
                save(steps, student, trainings[steps].history)
        students[steps] = teacher = student.eval()
    return students, trainings
