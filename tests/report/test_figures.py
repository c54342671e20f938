"""Every figure can be drawn from the committed records, of one seed and of several, and says what it shows."""

import io

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lib.report import figures
from lib.report.figures import defensive, diffpure, diffusion_distillation, kd, robust_distillation
from lib.report.figures.diffpure_defences import LOOKS
from lib.utils.artifacts import results_dir
from lib.utils.files import compress_png, read_json

EXPERIMENTS = {
    "kd": kd,
    "dd": defensive,
    "rd": robust_distillation,
    "diff": diffusion_distillation,
    "dp": diffpure,
}
NAMES = [(experiment, name) for experiment, module in EXPERIMENTS.items() for name in module.FIGURES]


def texts(figure: Figure) -> str:
    """Everything that a reader can read in a figure."""
    parts = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        parts += [axes.get_title(), axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()]
        parts += [t.get_text() for t in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels())]
    return " ".join(parts)


@pytest.mark.parametrize("experiment, name", NAMES)
def test_a_figure_is_drawn_from_one_seed_and_from_several(experiment, name):
    assert name.startswith(f"{experiment}_")
    committed = sorted(results_dir("digits", "records").glob(f"{experiment}-s*.json"))
    for files in (committed[:1], committed[:2]):
        records = [read_json(file) for file in files]
        if experiment == "dp" and "outcomes" not in records[0]:
            pytest.skip(
                "the committed record has no outcomes per image yet: test_diffpure_figures.py draws synthetic ones"
            )
        figure = EXPERIMENTS[experiment].FIGURES[name](records)
        drawn = [axes for axes in figure.axes if axes.lines or axes.collections or axes.images or axes.patches]
        assert isinstance(figure, Figure) and drawn and texts(figure).strip()
        assert figure.get_size_inches()[0] <= 7.25  # two columns of a paper, so that sizes of text are those in print
        written = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        assert min(t.get_fontsize() for t in written) >= 6
        plt.close(figure)


def test_error_bars_are_student_intervals_over_seeds():
    centre, half = figures.mean_and_half_width([[0.1, 0.5], [0.3, 0.5]])
    assert centre == pytest.approx([20, 50]) and half == pytest.approx([12.706 * 10, 0], rel=1e-3)  # t(0.975, 1) s / √2
    assert figures.mean_and_half_width([[0.1, 0.5]])[1] == pytest.approx([0, 0])


def test_error_bars_end_where_no_share_can_lie():
    """But those of quantities without an upper end do not."""
    figure, axes = figures.new_figure()
    for limits in (figures.SHARE, (0, float("inf"))):
        figures.draw_bars(axes, [1], [[1.0], [0.8]], limits)
    tops = [bars[2][0].get_segments()[0][:, 1].max() for bars in axes.containers]
    assert tops[0] == 100 < tops[1]
    plt.close(figure)


def test_one_method_has_one_look_in_all_figures():
    assert diffusion_distillation.SAMPLER_COLOURS["cd"] == LOOKS["cd"].colour
    looks = robust_distillation.METHOD_LOOKS
    assert set(looks) == set(robust_distillation.METHOD_NAMES) and len({str(look) for look in looks.values()}) == len(
        looks
    )
    assert looks["trades"][1] == LOOKS["trades"].colour and looks["pgd-at"][1] == LOOKS["pgd-at"].colour
    assert {*defensive.DEFENSIVE_NAMES.values()} <= set(defensive.DEFENSIVE_COLOURS)


def test_a_png_with_a_palette_looks_the_same_and_repeats():
    buffer = io.BytesIO()
    figure, axes = figures.new_figure()
    axes.plot([0, 1], [0, 1])
    figure.savefig(buffer, format="png")
    plt.close(figure)
    small = compress_png(buffer.getvalue())
    assert small == compress_png(buffer.getvalue()) and len(small) < len(buffer.getvalue())
    before, after = (Image.open(io.BytesIO(b)).convert("RGB") for b in (buffer.getvalue(), small))
    assert before.size == after.size
    worst = max(abs(a - b) for a, b in zip(before.tobytes(), after.tobytes(), strict=True))
    assert worst <= 16
