"""What the project claims: statements with rules that are written before the run; `lib.report.claims` decides them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One statement about one number per seed.

    `value`: path of the number in the metrics of its experiment; `scale`: what it is multiplied by to be in `unit`;
    `rule`: "above" and "below" ask the whole 95 % interval over seeds to lie on that side of `threshold`, "not above"
    asks it not to lie above, "mean" asks the mean to reach it, "every" asks no seed to lie above;
    `expected`: what was expected before the run; `source`: the published figure, which is not the same data unless it
    says so; `of`: whose records, if not those of the experiment in the id; `count`: path of the number of images. One
    seed decides nothing: it is "not applicable".
    """

    id: str
    statement: str
    value: str
    rule: str
    threshold: float
    expected: str
    source: str
    unit: str = "points"
    scale: float = 100.0
    of: str = ""
    count: str = "n_test"


HINTON_2015 = "Hinton et al. 2015, MNIST, not the same data: "
PAPERNOT_2016 = "Papernot et al. 2016, MNIST, not the same data or attack: "
CARLINI_WAGNER_2017 = "Carlini and Wagner 2017, MNIST, not the same data: "
RSLAD_SURVEY = "CIFAR-10, ResNet-18 under AutoAttack, not the same data: "
CLAIMS = (
    Claim(
        "kd.teacher",
        "The wide teacher reaches 97 % test accuracy",
        "teacher.test",
        "mean",
        97.0,
        "≈ 99 %, in trials 97 to 98 %",
        HINTON_2015 + "teacher 67 errors of 10 000",
        unit="%",
    ),
    Claim(
        "kd.gain_100",
        "On 100 labels, soft targets raise the small student's test accuracy (T = 4, α = 0.9, untuned)",
        "students.100.gain",
        "above",
        0.0,
        "+3.6 points (trial)",
        HINTON_2015 + "student 146 → 74 errors, all labels",
    ),
    Claim(
        "kd.gain_200",
        "On 200 labels, soft targets raise the small student's test accuracy (T = 4, α = 0.9, untuned)",
        "students.200.gain",
        "above",
        0.0,
        "+2.4 points (trial)",
        HINTON_2015 + "student 146 → 74 errors, all labels",
    ),
    Claim(
        "kd.soft_100",
        "With soft targets, 100 labels are enough for 91.1 % test accuracy",
        "students.100.soft",
        "mean",
        91.1,
        "91.1 % (trial)",
        "our own trial",
        unit="%",
    ),
    Claim(
        "kd.gain_tuned",
        "On 100 labels, soft targets help when both sides are tuned on validation with grids of one size",
        "tuned.gain",
        "above",
        0.0,
        "above 0",
        HINTON_2015 + "T > 8 all similar for large students, 2.5–4 for tiny ones",
    ),
    Claim(
        "kd.dark_knowledge",
        "The teacher's softened second thoughts rank class pairs as the distance of their mean images does",
        "relations.rho_chosen",
        "above",
        0.0,
        "ρ above 0",
        HINTON_2015 + "shown by example",
        unit="Spearman's ρ",
        scale=1.0,
    ),
    Claim(
        "kd.omitted_recall",
        "After prior matching, the soft student recognises most images of a class that it never saw",
        "omitted.soft.prior.recall",
        "above",
        50.0,
        "most of the class",
        HINTON_2015 + "98.6 % of the threes, bias tuned on the test set (206 → 109 errors)",
        unit="%",
    ),
    Claim(
        "kd.omitted_control",
        "Prior matching does not do that for a student on hard labels: recall, soft minus hard",
        "omitted.recall_gain",
        "above",
        0.0,
        "far above 0",
        "control of ours",
    ),
    Claim(
        "dd.apparent",
        "Defensive distillation seems to stop FGSM (ε = 0.2): accuracy left, T = 100 minus T = 1",
        "summary.apparent_fgsm",
        "mean",
        50.0,
        "≥ 50 points",
        PAPERNOT_2016 + "JSMA success 95.89 % → 0.45 % (from a survey)",
    ),
    Claim(
        "dd.zero_gradient",
        "The cross-entropy's float32 gradient is exactly 0 on most images at T = 100",
        "summary.zero_gradient",
        "above",
        50.0,
        "96.3 % (trial)",
        "our own trial",
        unit="%",
    ),
    Claim(
        "dd.cw_breaks",
        "C&W L2 breaks the network distilled at T = 100",
        "summary.cw_success",
        "mean",
        99.0,
        "≥ 99 %",
        CARLINI_WAGNER_2017 + "100 % (from notes)",
        unit="%",
    ),
    Claim(
        "dd.cw_breaks_every_T",
        "C&W L2 breaks the network distilled at any temperature tried (the least success)",
        "summary.cw_success_min",
        "mean",
        99.0,
        "≥ 99 %",
        CARLINI_WAGNER_2017 + "100 % (from notes)",
        unit="%",
    ),
    Claim(
        "dd.cw_l2_ratio",
        "C&W needs hardly more: mean L2 distance at T = 100 over that at T = 1",
        "summary.cw_l2_ratio",
        "below",
        1.25,
        "near 1",
        CARLINI_WAGNER_2017 + "1.7 / 1.36 = 1.25, best case (from notes)",
        unit="×",
        scale=1.0,
    ),
    Claim(
        "dd.no_robustness",
        "Worst case over all attacks (ε = 0.1): accuracy at T = 100 minus T = 1 is not above 0",
        "summary.worst_small",
        "not above",
        0.0,
        "not above 0",
        CARLINI_WAGNER_2017 + "no effect of T on the distance, ρ = −0.05 (from notes)",
    ),
    Claim(
        "dd.no_robustness_large",
        "The same at ε = 0.2, where FGSM saw a gain",
        "summary.worst_large",
        "not above",
        0.0,
        "not above 0",
        "Carlini and Wagner 2017",
    ),
    Claim(
        "dd.kd_student",
        "Classic distillation gives no robustness either: worst case (ε = 0.1), soft minus hard labels",
        "summary.kd_worst_small",
        "not above",
        0.0,
        "not above 0",
        "control of ours",
    ),
    Claim(
        "rd.teacher",
        "The wide teacher is more robust than the student by its own TRADES (ε = 0.15, two APGDs)",
        "summary.teacher_minus_trades",
        "above",
        0.0,
        "+4 to +6 points (trial)",
        RSLAD_SURVEY + "TRADES WRN-34-10 53.08 %, TRADES student 49.23 % (from a survey)",
    ),
    Claim(
        "rd.gain_pgd_at",
        "Guided TRADES, distilled, beats PGD-AT of the same student (ε = 0.15, worst case)",
        "summary.guided_minus_pgd-at",
        "above",
        0.0,
        "+7 points (trial)",
        RSLAD_SURVEY + "RSLAD 51.49 %, PGD-AT 45.83 % (from a survey)",
    ),
    Claim(
        "rd.gain_trades",
        "It beats TRADES of the same student, too",
        "summary.guided_minus_trades",
        "above",
        0.0,
        "+1 point (trial), the goal",
        RSLAD_SURVEY + "RSLAD 51.49 %, TRADES 49.23 % (from a survey)",
    ),
    Claim(
        "rd.not_the_teacher",
        "But the label in the teacher's place does as well: guided TRADES minus TRADES + PGD-AT is not above 0",
        "summary.guided_minus_trades-at",
        "not above",
        0.0,
        "+0.4 points (trial), within noise",
        "control of ours",
    ),
    Claim(
        "rd.published",
        "The best published distillation that ran, by validation, stays below TRADES of the same student",
        "summary.published_minus_trades",
        "below",
        0.0,
        "−5 to −10 points (trial)",
        RSLAD_SURVEY + "all of them above TRADES or equal (from a survey)",
    ),
    Claim(
        "rd.kd_natural",
        "A natural teacher's soft labels, without adversarial examples, add less than 5 points of robustness",
        "summary.natural_kd_minus_natural",
        "below",
        5.0,
        "below 5 points",
        "control of ours",
    ),
    Claim(
        "rd.kd_robust",
        "A robust teacher's soft labels add some without any adversarial example: KD minus natural student",
        "summary.kd_minus_natural",
        "above",
        0.0,
        "above 0 (one small trial: +18 points)",
        "control of ours",
    ),
    Claim(
        "rd.few_labels",
        "With 250 labels, guided TRADES with a teacher and unlabelled images beats TRADES on the labels (two APGDs)",
        "summary.transfer_guided_minus_few_trades",
        "above",
        0.0,
        "+6 points (one trial)",
        "our own trial: 52.6 to 53.3 % against 50.4 to 53.0 %",
    ),
    Claim(
        "rd.few_labels_soft",
        "There, soft labels add to what the teacher's classes alone give: guided TRADES minus TRADES + PGD-AT on them",
        "summary.transfer_guided_minus_trades-at",
        "above",
        0.0,
        "unknown",
        "control of ours",
    ),
    *(
        Claim(
            f"diff.{kind}_{n}",
            f"{student} in {n} step{'s' if n > 1 else ''} is closer to the 100-step ODE than undistilled DDIM in {n}",
            f"summary.{kind}_{n}_gain",
            "above",
            0.0,
            expected,
            source,
            unit="10⁻³ px²",
            scale=1e3,
        )
        for kind, student, source, expectations in (
            (
                "better",
                "The better student by validation",
                "our own trial",
                ("+0.75 (trial)", "above 0", "near 0 (trial: CD 1 step against DDIM-4)"),
            ),
            (
                "pd",
                "Progressive distillation",
                "Salimans and Ho 2022, other data and measure",
                ("above 0", "above 0", "above 0"),
            ),
            (
                "cd",
                "Consistency distillation",
                "Song et al. 2023, other data and measure",
                ("+0.75 (trial)", *["below 0 (trial): fresh noise between jumps"] * 2),
            ),
        )
        for n, expected in zip((1, 2, 4), expectations, strict=True)
    ),
    Claim(
        "diff.accuracy_4",
        "On purified clean images a classifier loses less than 1 point: better student in 4 steps minus SDE in 100",
        "summary.better_4_accuracy",
        "above",
        -1.0,
        "near 0",
        "our own trial",
    ),
    *(
        Claim(
            f"dp.speed_{n}",
            f"The {n}-step student purifies at least {least:g} times as fast as DiffPure's 100 steps, batch of 256",
            f"cd_{n}",
            "above",
            least,
            expected,
            "our own trial; each round is one measurement in the seed's place",
            unit="×",
            scale=1.0,
            of="speed",
        )
        for n, least, expected in ((1, 90.0, "98 × (trial)"), (2, 45.0, "49 × (trial)"))
    ),
    *(
        Claim(
            f"dp.{kind}_{label}_{short}",
            f"{text} loses at most 1 point to its teacher, the strongest attack on each: {measure}",
            f"summary.{kind}_{label}_minus_teacher_{what}",
            "above",
            -1.0,
            expected,
            "open; one trial of ours, other attacks: 86.9 / 74.2 % (one step, adaptive), teacher 89.6 / 78.1 %",
        )
        for kind, label, text, expected in (
            ("clean", "few", "The two-step student of clean pairs", "−2.5 / +6 points (one seed)"),
            ("adaptive", "one", "The one-step student with adaptive δ", "+7 / +12 points (one seed)"),
            ("adaptive", "few", "The two-step student with adaptive δ", "+9 / +19 points (one seed)"),
        )
        for what, short, measure in (("average", "average", "average"), ("worst", "worst", "right in all of 10 draws"))
    ),
    *(
        Claim(
            f"dp.constraint_{label}{suffix}",
            f"The adaptive constraint helps the {n}-step student under {text}: minus the student of clean pairs",
            f"summary.{path}",
            "above",
            0.0,
            expected,
            "our own trial found a loss with grey-box δ and a gain with δ through the student",
            count=f"threats.clean-1/{'many' if suffix else 'exact'}.n",
        )
        for n, label in ((1, "one"), (2, "few"))
        for suffix, text, path, expected in (
            ("", "the strongest attack", f"adaptive_minus_clean_{label}_average", "+11 points (one seed)"),
            (
                "_many",
                "exact gradients, more points",
                f"adaptive_minus_clean_{label}_many_average",
                "+7 points (one seed)",
            ),
        )
    ),
    Claim(
        "dp.constraint_grey",
        "It helps in the grey box, too (two steps)",
        "summary.grey_adaptive_minus_clean",
        "above",
        0.0,
        "above 0",
        "our own trial: 98.4 → 97.3 % clean → grey box, against 98.6 → 90.0 %",
    ),
    Claim(
        "dp.inherits",
        "More of δ survives the one-step student of clean pairs than its teacher: share of δ, student minus teacher",
        "summary.inherited_clean_one_minus_teacher",
        "above",
        0.0,
        "above 0",
        "open",
        count="n_inherited",
    ),
    Claim(
        "dp.inherits_less",
        "The adaptive constraint lets less of δ through: share of δ in one step, minus the student of clean pairs",
        "summary.inherited_adaptive_one_minus_clean",
        "below",
        0.0,
        "below 0",
        "open",
        count="n_inherited",
    ),
    Claim(
        "dp.noskip",
        "Without c_skip less of δ survives the one-step student of clean pairs: share of δ, minus the same with c_skip",
        "summary.inherited_noskip_minus_skip",
        "below",
        0.0,
        "unknown",
        "Lei et al. 2025 (OSCP, latent space, other data) set c_skip to 0, since it carries the attack",
        count="n_inherited",
    ),
    Claim(
        "dp.match_sde",
        "Matching the SDE gives its mean, the undistilled denoiser: distance to it, minus that of who matches the ODE",
        "summary.match_sde_minus_ode_to_denoiser",
        "below",
        0.0,
        "below 0",
        "what a squared distance to a random target asks for",
        unit="10⁻³ px²",
        scale=1e3,
        count="n_inherited",
    ),
    Claim(
        "dp.no_red_flag",
        "No check of the diagnosis is red on a defence that these claims are about (number of red checks)",
        "summary.red_flags",
        "every",
        0.0,
        "0",
        "control of ours",
        unit="checks",
        scale=1.0,
        count="n_diagnosed",
    ),
    Claim(
        "dp.teacher_bpda",
        "The teacher's exact gradient is no weaker than BPDA of the same budget: accuracy left, exact minus BPDA",
        "summary.teacher_exact_minus_bpda",
        "not above",
        0.0,
        "not above 0",
        "control of ours",
    ),
    Claim(
        "dp.teacher_surrogate",
        "Nor than the same budget through the two-step student as surrogate: accuracy left, exact minus surrogate",
        "summary.teacher_exact_minus_surrogate",
        "not above",
        0.0,
        "not above 0",
        "control of ours",
    ),
)
