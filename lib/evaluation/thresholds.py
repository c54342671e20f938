"""The checks of `lib.evaluation.sanity_checks`: thresholds, sources, reasons and advice."""

import math
from typing import NamedTuple


class Check(NamedTuple):
    """A check's threshold, its source, the reason for the threshold, and what to do when it is red."""

    threshold: float
    source: str
    reason: str
    advice: str


MASKED = "attack with losses free of the scale (margin, DLR), without gradients (Square), and by transfer"
STRONGER = "more steps, restarts and other losses before any claim"
TWO = "2 of 100 images may differ by chance"
CW_2017, CARLINI_2019, ATHALYE_2018, PINTOR_2022 = (
    "Carlini and Wagner 2017, VIII",
    "Carlini et al. 2019, checklist",
    "Athalye et al. 2018, signs",
    "Pintor et al. 2022, indicator",
)
CHECKS = {
    "zero gradients": Check(
        0.01, f"{CW_2017}; {PINTOR_2022}, 1", "1 % allows for a few images of extreme margin", MASKED
    ),
    "logit margin, median": Check(88.0, CW_2017, "e^-88 is float32's smallest normal number", MASKED),
    "logit margin, 95 %": Check(104.0, CW_2017, "from 104 the cross-entropy's float32 gradient is 0", MASKED),
    "float32 vs float64 gradients": Check(
        0.05, CW_2017, "from margin 17 rounding turns some, rarely by 60°", "use float64"
    ),
    "float32 vs float64 attack": Check(0.03, CW_2017, TWO, "attack in float64"),
    "one-step vs iterative": Check(
        0.01, f"{ATHALYE_2018}; {CARLINI_2019}", "PGD from many starts can take its step", STRONGER
    ),
    "white-box vs Square": Check(0.03, f"{ATHALYE_2018}; AutoAttack's flag", "its 0.2 points need 1000 images", MASKED),
    "white-box vs transfer": Check(0.03, CARLINI_2019, TWO, MASKED),
    "white-box vs noise": Check(0.01, ATHALYE_2018, "noise is the weakest attack there is", MASKED),
    "no-attack control": Check(
        0.01, CARLINI_2019, "another prediction without an attack changes nothing", "evaluate with draws > 1"
    ),
    "larger eps, no better": Check(0.03, ATHALYE_2018, TWO, STRONGER),
    "accuracy at grey eps": Check(math.nan, CARLINI_2019, "one grey image is in every ball: chance, 1/k", STRONGER),
    "unbounded attack": Check(
        0.0, f"{ATHALYE_2018}; {PINTOR_2022}, 6", "every image can be replaced by any other", MASKED
    ),
    "more restarts": Check(0.03, CARLINI_2019, TWO, "more restarts"),
    "more steps": Check(0.03, CARLINI_2019, TWO, "more steps"),
    "loss landscape": Check(0.1, f"{PINTOR_2022}, 2", "10 % mean relative change within eps / 20", "BPDA, EOT"),
    "silent success": Check(0.05, f"{PINTOR_2022}, 3", "a last step may fall back by chance", "return the best point"),
    "incomplete optimisation": Check(
        0.2, f"{PINTOR_2022}, 4", "measured on digits: 0.05-0.13 when converged", "more steps"
    ),
    "transfer failure": Check(
        0.05, f"{PINTOR_2022}, 5", "what fools the attacked function fools the model", "a closer target"
    ),
    "random answers": Check(
        0.0, ATHALYE_2018, "any change between two answers is noise", "attack with eot, evaluate with draws > 1"
    ),
    "softmax output": Check(0.5, CW_2017, "rows that sum to 1 are no logits", "give the logits before the softmax"),
}
