"""Parameters of notebooks: the table covers them all, and `-p` and params.yaml are checked by it."""

import re
from typing import get_args

import nbformat
import pytest

from lib import data, models
from lib.diffusion.network import PREDICTION_TARGETS
from lib.distillation import adversarial, consistency, progressive, robust_consistency
from lib.experiments import robust_runs
from lib.pipeline import notebook, parameters, profile, schema
from lib.utils.code_hash import SOURCES
from lib.utils.files import ROOT
from lib.utils.precision import PRECISIONS
from lib.utils.training_state import Settings
from lib.utils.validation import setting_types
from lib.utils.yaml_files import read_yaml

KD = ROOT / SOURCES["kd"]
RUN_OF = {key: set(schema.RUN) - {"write"} | set(schema.SECTIONS["data"]) for key in ("kd", "dd", "rd", "diff", "dp")}


@pytest.fixture
def small(tmp_path):
    nb = nbformat.v4.new_notebook()
    cell = 'epochs: int = 3\nlr: float = 1e-3\nname = "a"\nflag: bool = False\ncounts: list = [1, 2]\nalpha = 2.5'
    nb.cells = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})]
    nbformat.write(nb, tmp_path / "small.ipynb")
    return tmp_path / "small.ipynb"


def test_the_table_covers_the_base_and_all_notebooks():
    base = read_yaml(profile.PROFILES / "base.yaml")
    assert list(base) == [*schema.TOP, *schema.SECTIONS]
    assert all(list(base[name]) == list(types) for name, types in schema.SECTIONS.items())
    for name, run in RUN_OF.items():
        defaults = parameters.notebook_defaults(ROOT / SOURCES[name])
        assert set(defaults) == run | set(schema.SECTIONS[name])
        types = schema.notebook_types(defaults)
        assert all(types[key] == schema.SECTIONS[name][key] for key in schema.SECTIONS[name])
        assert all(types[key] == (schema.RUN | schema.SECTIONS["data"])[key] for key in run)
    report = parameters.notebook_defaults(ROOT / SOURCES["report"])
    assert set(report) == {"profile", "write"} | set(schema.SECTIONS["seeds"])
    assert schema.notebook_types(report)["kd_seeds"] == schema.SECTIONS["seeds"]["kd_seeds"]


def test_choices_in_the_table_are_those_of_the_library():
    kd, rd, diff, dp = (schema.SECTIONS[name] for name in ("kd", "rd", "diff", "dp"))
    assert set(get_args(schema.Dataset)) == set(data.SIZES)
    assert set(get_args(kd["teacher"])) == set(models.ARCHITECTURES)
    assert set(get_args(schema.RobustMethod)) == set(robust_runs.TRIALS) <= set(adversarial.METHODS)
    assert set(get_args(rd["optimizer"])) == set(get_args(setting_types(Settings)["optimizer"]))
    assert set(get_args(rd["precision"])) == set(PRECISIONS)
    assert set(get_args(diff["target"])) == set(PREDICTION_TARGETS)
    assert set(get_args(diff["weight"])) == set(progressive.SNR_WEIGHTS)
    assert set(get_args(diff["cd_weight"])) == set(consistency.CONSISTENCY_WEIGHTS)
    assert set(get_args(dp["measure"])) == set(consistency.DISTANCES)
    for variant in robust_consistency.VARIANTS:
        assert all(schema.fits(name, schema.StudentVariant) for name in (variant, f"noskip-{variant}@features"))
    teachers = ["natural", "weak", "middle", "trades", "pgd-at"]
    assert schema.fits(teachers, rd["teachers"]) and len(robust_runs.teacher_runs(teachers)) == 5
    assert all(len(data.CLASSES[name]) == schema.CLASS_COUNT for name in data.SIZES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 3.0}, r"epochs to be an integer >= 1.*, got 3.0: an example is 3"),
        ({"epochs": True}, "got True"),
        ({"lr": "1e-3"}, r"lr to be a finite number > 0, got '1e-3'"),
        ({"lr": float("nan")}, "got nan"),
        ({"flag": 1}, "flag to be True or False, got 1"),
        ({"counts": [1, "2"]}, "counts to be a list, each entry an integer"),
        ({"epoch": 3}, r"unknown parameter 'epoch' in small.ipynb: did you mean epochs\? expected one of epochs, lr"),
    ],
)
def test_types_are_strict(small, values, message):
    with pytest.raises(ValueError, match=message):
        parameters.check_parameters(values, parameters.notebook_defaults(small), small)


def test_an_int_may_stand_for_a_float_and_text_is_read_as_yaml(small):
    checked = parameters.check_parameters({"lr": 1, "counts": []}, parameters.notebook_defaults(small), small)
    assert checked == {"lr": 1.0, "counts": []} and isinstance(checked["lr"], float)
    pairs = [("counts", "[3]"), ("flag", "true"), ("name", "8/255"), ("alpha", "8/255")]
    expected = {"counts": [3], "flag": True, "name": "8/255", "alpha": 8 / 255}  # a parameter of its own, not kd's
    assert parameters.gather_parameters(small, [], pairs) == expected


def test_a_notebook_without_its_parameters_cell_is_refused(tmp_path):
    for name, tags, message in (("a", [], "cell tagged `parameters`, got 0"), ("b", ["parameters"], "literal assign")):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n = len([])", metadata={"tags": tags})])
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
        with pytest.raises(parameters.BadParameter, match=message):
            parameters.notebook_defaults(tmp_path / f"{name}.ipynb")


def test_an_unknown_section_names_the_known_ones(small):
    with pytest.raises(ValueError, match=r"'dk' in params.yaml: .*expected one of data, seeds, kd, dd, rd, diff, dp"):
        parameters.gather_parameters(small, ["dk"], [])
    with pytest.raises(ValueError, match="expected each parameter in one section"):
        parameters.gather_parameters(small, ["kd", "dd"], [])


PAIRS = {  # NAME VALUE of the kd notebook → the value, or what the refusal says
    ("student_lr", "1e-5"): 1e-5,
    ("student_lr", "1/200"): 0.005,
    ("student_lr", "-1e-3"): "> 0, got -0.001",
    ("student_lr", "nan"): "> 0, got 'nan'",
    ("student_lr", ".nan"): "> 0, got nan",
    ("student_lr", "inf"): "> 0, got 'inf'",
    ("student_lr", "1e400"): "> 0, got inf",
    ("student_lr", "-0.0"): "> 0, got -0.0",
    ("student_lr", "1/0"): "> 0, got '1/0'",
    ("student_lr", "1" + "0" * 400 + "/3"): "> 0, got",
    ("student_lr", "1" * 400): "> 0, got",
    ("student_lr", "[1, 2]"): "> 0, got",
    ("student_lr", ""): "> 0, got None",
    ("student_lr", "--quiet"): "> 0, got '--quiet'",
    ("T", "8"): 8.0,
    ("alpha", "1.5"): ">= 0 and <= 1, got 1.5",
    ("members", "1e1"): "an integer >= 1",
    ("members", "010"): 10,
    ("members", "1" * 5000): "integer string",
    ("members", "&a 1"): "an anchor",
    ("seed", "-1"): "an integer >= 0",
    ("alphas", "[0.5, 1/4]"): [0.5, 0.25],
    ("alphas", "[0.5, 0.5]"): "different entries",
    ("alphas", "[" * 3000): "more than 10 levels",
    ("alphas", "{a: 1}"): "a list of",
    ("clock", "False"): False,
    ("clock", "no"): "True or False",
    ("dataset", "cifar11"): "one of 'digits'",
    ("profile", "a-b_1"): "a-b_1",
    ("profile", ""): "a name of up to 64",
    ("profile", "../../trav"): "a name of up to 64",
    ("profile", "a/b"): "a name of up to 64",
    ("profile", "/abs"): "a name of up to 64",
    ("profile", "-x"): "a name of up to 64",
    ("profile", ".."): "a name of up to 64",
    ("--T", "1"): "unknown parameter '--T'",
    ("te\nacher", "1"): "unknown parameter",
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: ascii(f"{pair[0]} {pair[1][:20]}"))
def test_fault_30_40_values_of_the_command_line_are_checked_in_one_line(pair, tmp_path, monkeypatch, capsys):
    """Through the command, whose parser would take -1e-3 for an option."""
    runs: list[dict] = []
    monkeypatch.setattr(notebook, "run_notebook", lambda source, out, values, *rest, **more: runs.append(values))
    arguments, expected = [str(KD), str(tmp_path / "out.ipynb"), "-p", *pair], PAIRS[pair]
    valid = not isinstance(expected, str) or expected == pair[1]
    if valid:
        notebook.main(arguments)
        assert runs == [{pair[0]: expected}] and type(runs[0][pair[0]]) is type(expected)
        return
    with pytest.raises(SystemExit) as caught:
        notebook.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and re.search(re.escape(expected), error) and not runs
    assert error.startswith("lib.run: ") and error.count("\n") == 1 and len(error) < 700


def test_fault_30_a_parameter_given_twice_is_refused():
    with pytest.raises(parameters.BadParameter, match="expected -p T once, got it 2 times"):
        parameters.gather_parameters(KD, [], [("T", "1"), ("T", "2")])


def test_fault_30_sections_may_stand_before_pairs_and_files():
    arguments = ["--section", "data", "kd", "-p", "seed", "3", "nb", "out"]
    assert parameters.protect_pairs(arguments) == ["--section", "data", "kd", "-p", " seed", " 3", "nb", "out"]
    assert [parameters.unprotect(text) for text in (" seed", "  x")] == ["seed", " x"]


def test_sections_are_taken_from_params_yaml_and_overridden_by_pairs():
    params = profile.read_params()
    values = parameters.gather_parameters(KD, ["data", "kd"], [("T", "2")])
    assert values == params["data"] | params["kd"] | {"profile": params["profile"], "T": 2.0}
