"""Progressive distillation on Gaussian data, where every step is linear: one student step is two of its teacher."""

import math

import pytest
import torch

from lib.diffusion.network import build_unet, eps_model
from lib.diffusion.schedule import CLEAN, alpha_sigma, time_grid
from lib.diffusion.solvers import ddim_step, reverse_process
from lib.distillation import progressive
from lib.utils.seeds import seeded_generator
from tests.diffusion.test_diffusion import draws, gaussian


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_one_step_on_the_target_is_two_steps_of_the_teacher(steps):
    times, fine = time_grid(99, steps), time_grid(99, 2 * steps)
    for k in range(steps):
        now, middle, then = fine[2 * k : 2 * k + 3]
        assert (now, then) == pytest.approx((times[k], times[k + 1]))
        z = draws(20, now)
        x = progressive.two_step_target(gaussian, z, now, middle, then)
        one = ddim_step(z, (z - alpha_sigma(now)[0] * x) / alpha_sigma(now)[1], alpha_sigma(now), alpha_sigma(then))
        torch.testing.assert_close(one, reverse_process(gaussian, z, [now, middle, then], "ddim"), rtol=1e-9, atol=1e-9)
    assert then == CLEAN


def test_targets_of_a_batch_with_levels_of_its_own_are_those_of_each():
    fine = torch.tensor(time_grid(99, 8), dtype=torch.float64)
    z, k = draws(4, 60), torch.tensor([0, 3, 1, 2])
    batch = progressive.two_step_target(gaussian, z, *(fine[2 * k + j] for j in range(3)))
    for i, j in enumerate(k.tolist()):
        one = progressive.two_step_target(gaussian, z[i : i + 1], *fine[2 * j : 2 * j + 3].tolist())
        torch.testing.assert_close(batch[i : i + 1], one)


class Linear(torch.nn.Module):
    """A student whose v is linear in z, with its own coefficients for each level of its grid: enough for Gaussians."""

    def __init__(self, steps):
        super().__init__()
        self.times = time_grid(99, steps)[:-1]
        self.w = torch.nn.Parameter(torch.zeros(steps, 2, dtype=torch.float64))

    def forward(self, z, t):
        row = (torch.tensor(self.times, dtype=t.dtype)[None] - t[:, None]).abs().argmin(1)
        w = self.w[row]
        sample = w[:, 0, None, None, None] * z + w[:, 1, None, None, None]
        return type("Output", (), {"sample": sample})


@pytest.mark.parametrize("weight", progressive.SNR_WEIGHTS)
def test_a_linear_student_learns_the_two_steps_to_five_digits(weight):
    student = Linear(2)
    loss = progressive.progressive_loss(gaussian, 2, t=99, weight=weight)
    x = (0.3 + 0.5 * torch.randn(4096, 1, 1, 1, generator=seeded_generator(0, "x"), dtype=torch.float64) + 1) / 2
    optimizer = torch.optim.LBFGS(
        student.parameters(), lr=1, max_iter=60, tolerance_grad=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(student, x, generator=seeded_generator(1, "k"), epoch=0)[0]
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    z = draws(50, 99, seed=5)
    with torch.no_grad():
        student_end = reverse_process(eps_model(student, "v"), z, time_grid(99, 2), "ddim")
    truth = reverse_process(gaussian, z, time_grid(99, 4), "ddim")
    torch.testing.assert_close(student_end, truth, rtol=1e-5, atol=1e-5)


def test_weights():
    snr = torch.tensor([0.25, 8.7, 1e4])
    assert progressive.SNR_WEIGHTS["truncated"](snr).tolist() == pytest.approx([1, 8.7, 1e4])
    assert progressive.SNR_WEIGHTS["snr+1"](snr).tolist() == pytest.approx([1.25, 9.7, 10001])
    assert progressive.SNR_WEIGHTS["capped"](snr).tolist() == pytest.approx([1.25, 9.7, 20])
    alpha, s = alpha_sigma(99)
    assert (alpha / s) ** 2 == pytest.approx(8.7, abs=0.05)
    eps, x, other = torch.randn(3, 6, 1, 2, 2, generator=seeded_generator(0, "w"), dtype=torch.float64)
    z = alpha * x + s * eps  # SNR + 1 is the loss on v = α ε − s x, when z is given
    v, v_other = ((alpha * z - point) / s for point in (x, other))
    ratio = (v - v_other).square().sum() / (x - other).square().sum()
    assert ratio.item() == pytest.approx(1 / s**2) and 1 / s**2 == pytest.approx((alpha / s) ** 2 + 1)


def test_students_begin_at_their_teacher_are_saved_and_an_interrupted_run_goes_on():
    x = torch.rand(16, 1, 4, 4, generator=seeded_generator(0, "x"))
    teacher = build_unet(1, 4, (8, 8), seed=0)
    saved = {}
    options = {"t": 99, "epochs": 1, "batch_size": 8, "lr": 1e-12, "progress": False}
    students, trained = progressive.progressive_distillation(
        teacher, (x,), progressive.student_steps(8), save=lambda n, net, rows: saved.__setitem__(n, net), **options
    )
    assert list(students) == list(saved) == list(trained) == [4, 2, 1]
    for student in students.values():
        for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    again, more = progressive.progressive_distillation(
        teacher, (x,), [4, 2, 1], load={4: students[4], 2: students[2]}.get, **options
    )
    assert list(more) == [1] and again[4] is students[4]
    assert all(math.isfinite(fit.history[0]["loss"]) for fit in trained.values())
    for bad in (0, 1, 6):
        with pytest.raises(ValueError, match="power of 2"):
            progressive.student_steps(bad)
    with pytest.raises(ValueError, match="got 'snr'"):
        progressive.progressive_loss(gaussian, 2, t=99, weight="snr")
