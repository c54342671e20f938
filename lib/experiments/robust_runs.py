"""The trainings of experiment 3: which methods, teachers, trials and follow-ups are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lib.distillation.adversarial import METHODS
from lib.utils.record_keys import run_key

PUBLISHED = ("ard", "rslad", "iad", "adaad", "igdm")
OURS = ("teach", "guided")
COMPARED = {"natural", "kd", "pgd-at", "trades", "trades-at", "ard", "rslad", "teach", "guided"}
TEACHER_ABLATION = ("kd", "rslad", "guided")  # trained with every other teacher too
FEW_LABEL_METHODS = ("pgd-at", "trades", "trades-at", "teach", "guided")  # compared when labels are few
MAIN_TEACHER = "trades"  # the teacher of all methods outside the teacher ablation

# The trials of each method, as many for the baselines as for the others: options of the loss, or `lr`, a factor on the
# learning rate, where it has none. The validation split chooses.
TRIALS: dict[str, list[dict[str, float]]] = {
    "natural": [{"lr": 1.0}, {"lr": 0.5}, {"lr": 0.25}],
    "pgd-at": [{"lr": 1.0}, {"lr": 0.5}, {"lr": 2.0}],
    "trades": [{"beta": 6.0}, {"beta": 3.0}, {"beta": 9.0}],
    "trades-at": [{"lam": 0.1}, {"lam": 0.05}, {"lam": 0.2}],
    "mart": [{"lam": 3.0, "lr": 0.5}, {"lam": 1.0, "lr": 0.5}, {"lam": 6.0, "lr": 0.25}],
    "kd": [{"tau": 4.0}, {"tau": 2.0}, {"tau": 8.0}],
    "ard": [{"tau": 1.0}, {"tau": 4.0}, {"tau": 2.0}],
    "rslad": [{"clean": 1 / 6}, {"clean": 1 / 3}, {"clean": 1 / 2}],
    "iad": [{"beta": 0.1}, {"beta": 0.5}, {"beta": 1.0}],
    "adaad": [{"lr": 1.0}, {"lr": 0.5}, {"lr": 2.0}],
    "igdm": [{"weight": 1.0}, {"weight": 5.0}, {"weight": 20.0}],
    "teach": [{"beta": 6.0}, {"beta": 3.0}, {"beta": 9.0}],
    "guided": [{"lam": 0.1}, {"lam": 0.05}, {"lam": 0.2}],
}


@dataclass(frozen=True)
class TrainingRun:
    """One training: its loss, its teacher and its images.

    `method`: one of `lib.distillation.adversarial.METHODS`; `teacher`: its name, "" for none; `trial`: options of the
    loss and `lr`, as in `TRIALS`; `radius`: of the training attack, as a share of eps; `length`: of the training, as a
    share of the recipe's epochs; `labels`: how many images are labelled (0: all); `transfer`: the others are used too,
    with the teacher's predicted classes as labels.
    """

    method: str
    teacher: str = ""
    trial: dict[str, float] = field(default_factory=dict)
    radius: float = 1.0
    length: float = 1.0
    labels: int = 0
    transfer: bool = False


def teacher_runs(others: Sequence[str]) -> dict[str, TrainingRun]:
    """Return the runs of `MAIN_TEACHER` and of `others` among natural, weak and middle (TRADES), pgd-at.

    The weak and the middle one learn at a third and two thirds of the radius, for as large a share of the epochs.
    """
    weak, middle = (TrainingRun("trades", radius=share, length=share) for share in (1 / 3, 2 / 3))
    runs = {
        "natural": TrainingRun("natural"),
        "weak": weak,
        "middle": middle,
        MAIN_TEACHER: TrainingRun("trades"),
        "pgd-at": TrainingRun("pgd-at"),
    }
    if unknown := sorted(set(others) - set(runs)):
        raise ValueError(f"expected teachers among {', '.join(runs)}, got {', '.join(unknown)}")
    return {name: run for name, run in runs.items() if name in (*others, MAIN_TEACHER)}


def grid_runs(trials: int, methods: Sequence[str] = ()) -> dict[str, TrainingRun]:
    """Return the first `trials` runs of every method of `TRIALS`, or of `methods`, keyed by method and number."""
    methods = list(methods) or list(TRIALS)
    if unknown := sorted(set(methods) - set(TRIALS)):
        raise ValueError(f"expected methods among {', '.join(TRIALS)}, got {', '.join(unknown)}")
    if missing := sorted(COMPARED - set(methods)):
        raise ValueError(f"expected methods to include {', '.join(missing)}: the summary compares others with them")
    if not 1 <= trials <= 3:
        raise ValueError(f"expected 1 to 3 trials of each method, got {trials}")
    return {
        run_key(m, i): TrainingRun(m, MAIN_TEACHER if METHODS[m].teacher else "", trial)
        for m in methods
        for i, trial in enumerate(TRIALS[m][:trials])
    }


def choose_trials(fits: dict[str, dict], runs: dict[str, TrainingRun]) -> dict[str, str]:
    """Return for each method the key of its run with the best validation score, the first of equals."""
    chosen: dict[str, str] = {}
    for name, run in runs.items():
        best = chosen.get(run.method)
        if best is None or fits[name]["score"] > fits[best]["score"]:
            chosen[run.method] = name
    return chosen


def ablation_runs(
    chosen: dict[str, TrainingRun], teachers: Sequence[str], labels: int, temperatures: Sequence[float]
) -> dict[str, TrainingRun]:
    """Return the follow-up runs, with the trials that were chosen on all labels.

    `teacher/<method>/<teacher>`: students of the other teachers; `tau/<τ>`: ARD at each temperature; `few/<method>`:
    with `labels` labelled images only (0: none of these); `transfer/<method>`: with the other images too, labelled with
    the teacher's predicted classes. There, TRADES' variants without a teacher are the controls of the soft labels.
    """
    others = [name for name in teachers if name not in (MAIN_TEACHER, "pgd-at")]
    runs = {run_key("teacher", m, t): replace(chosen[m], teacher=t) for m in TEACHER_ABLATION for t in others}
    runs |= {run_key("tau", tau): replace(chosen["ard"], trial={"tau": float(tau)}) for tau in temperatures}
    if labels:
        few = {m: replace(chosen[m], labels=labels) for m in FEW_LABEL_METHODS}
        runs |= {run_key("few", m): run for m, run in few.items()}
        runs |= {
            run_key("transfer", m): replace(run, teacher=MAIN_TEACHER, transfer=True)
            for m, run in few.items()
            if m != "pgd-at"
        }
    return runs
