"""What each check of `lib.evaluation.sanity_checks` measures, and what it means when it is red: for those who read it.

Thresholds, sources and advice are those of `lib.evaluation.thresholds.CHECKS`.
"""

from typing import NamedTuple


class Meaning(NamedTuple):
    """What a check measures, and what it means when that is above the threshold."""

    measured: str
    explanation: str


UNUSED = "the gradient of the cross-entropy carries nothing, so attacks that follow it fail without any robustness"
WEAKER_WINS = "an attack that ought to be weaker breaks images that the stronger ones leave: the strong ones fail"
UNFINISHED = "the attack has not done what it can: what it leaves is too high"
MEANINGS = {
    "zero gradients": Meaning("share of images whose gradient is exactly 0", UNUSED),
    "logit margin, median": Meaning(
        "median of the label's logit minus the next one's", f"logits are so large that {UNUSED}"
    ),
    "logit margin, 95 %": Meaning(
        "95 % quantile of the label's logit minus the next one's", f"for some images {UNUSED}"
    ),
    "float32 vs float64 gradients": Meaning(
        "share of images whose gradient in float32 points elsewhere than in float64", "rounding decides the gradient"
    ),
    "float32 vs float64 attack": Meaning(
        "share of images that PGD breaks in float64 and not in float32", "rounding protects them from the attack"
    ),
    "one-step vs iterative": Meaning("share of images that FGSM breaks and PGD in all its runs does not", WEAKER_WINS),
    "white-box vs Square": Meaning(
        "share of images that Square, which asks for no gradient, breaks and PGD does not", WEAKER_WINS
    ),
    "white-box vs transfer": Meaning(
        "share of images that images made on the bare classifier break and PGD does not", WEAKER_WINS
    ),
    "white-box vs noise": Meaning("share of images that random noise in the ball breaks and PGD does not", WEAKER_WINS),
    "no-attack control": Meaning(
        "share of images that are not right in all draws without an attack",
        "repeated draws alone break them: no attack may claim these",
    ),
    "larger eps, no better": Meaning(
        "largest rise of the accuracy under PGD from one radius to a larger one",
        "a larger ball holds the smaller one, so an attack that works leaves no more in it",
    ),
    "accuracy at grey eps": Meaning(
        "accuracy under PGD where one grey image is in the ball of every image",
        "that image has one answer, so no defence can be right more often than by chance",
    ),
    "unbounded attack": Meaning(
        "accuracy under PGD with all images within reach", "an attack that cannot break even this does not work"
    ),
    "more restarts": Meaning("share of images that twice as many restarts break in addition", UNFINISHED),
    "more steps": Meaning("share of images that twice as many steps break in addition", UNFINISHED),
    "loss landscape": Meaning(
        "mean relative change of the loss by noise of eps / 20 around the attacked images",
        "the loss is so rough that its gradient says little of the next step",
    ),
    "silent success": Meaning(
        "share of images that PGD's path breaks and its last point does not", "the attack loses what it had reached"
    ),
    "incomplete optimisation": Meaning(
        "share of unbroken images whose loss still rises in PGD's last ten steps", UNFINISHED
    ),
    "transfer failure": Meaning(
        "share of images that break the function under attack and not the defence", "another function was attacked"
    ),
    "random answers": Meaning(
        "share of images that are answered differently in two calls", "one answer proves nothing, nor does one gradient"
    ),
    "softmax output": Meaning(
        "share of answers that sum to 1", "probabilities in place of logits: a second softmax flattens the gradient"
    ),
}
