"""Which test stands for which input that once failed: `python -m tests.faults` writes the table in tests/README.md.

A test belongs to an input by its name: `test_fault_06_32_…` to the inputs 6 and 32.
"""

import ast
import re
from collections import defaultdict

from lib.utils.files import ROOT, write_text

README = ROOT / "tests/README.md"
BEGIN, END = "<!-- faults: written by `python -m tests.faults` -->", "<!-- end of faults -->"
INPUTS = {
    1: "an evaluation inside `torch.inference_mode()`",
    2: "a model or purifier under `no_grad`, or with `detach`: no gradient",
    3: "`Purifier(clamp=True)` under attack",
    4: "`resume_dir` after `forward` or a private attribute changed",
    5: "`train(checkpoint=)` with another loss, images or labels",
    6: "options without effort or of another type, such as `restarts=0`, `steps=10.0`",
    7: "`PurifiedClassifier(fixed=0)` with a purifier that draws by itself",
    8: "a defence that draws from numpy or `random`",
    9: "16-bit images, ink in the alpha channel alone",
    10: "a.png and a.jpg in one folder",
    11: "int64 timesteps",
    12: "teacher's logits of another shape in `kd_loss`",
    13: "a foreign scheduler configuration beside the network",
    14: "soft targets at large T, in bfloat16",
    15: '`lambda z: bn(z)` in train mode; `mode="keep"`',
    16: "a model that changes its input in place",
    17: "the project unpacked inside another repository; an untracked module",
    18: "a clone with `core.autocrlf=true`",
    19: "float16 and bfloat16 images",
    20: "a model under autocast; float64 and float32 together",
    21: "NHWC images seen as NCHW",
    22: "numbers in YAML 1.2: `1e-05`",
    23: "a locale that is not UTF-8",
    24: '`train(precision="bf16")` after another training',
    25: "a model that closes over a module, or holds an array of text",
    26: "one attack of a list with another norm, without a surrogate or eps",
    27: "foreign purifiers; wrong sizes and channels",
    28: 'answers as tuples or dicts, numpy images, `attacks="pgd"`, `eps="8/255"`, `target=3`',
    29: "foreign networks: `sample_size`, pipelines, class-conditional, six channels",
    30: "`-p lr -1e-3`, `-p lr nan`; OUT a folder or a JPEG; a decompression bomb",
    31: "README's stage of another profile in a fresh clone",
    32: "attacks with no effort",
    33: "a model that answers NaN on attacked images",
    34: "certificates with NaN, images 0..255, another σ",
    35: "16-bit and float images to the purify command; broken weights",
    36: "OUT = IN",
    37: "a folder of networks that was changed",
    38: "a stage that makes its own input",
    39: "children that outlive their parents",
    40: "a profile's name as a path",
    41: "a device, link or folder as target",
    42: "leftovers of kills among the networks",
    43: "a broken checkpoint",
    44: "numbers of a training out of range",
    45: "profiles: cycles, duplicates, YAML 1.1, unknown names",
    46: "a dead kernel, a full disk, a half-written record",
    47: "mirror files; `requirements.txt` without hashes",
}


def fault_tests() -> dict[int, list[str]]:
    """Returns by number of the input the tests that stand for it, as file and name."""
    tests = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_fault((?:_\d\d)+)_", node.name)):
                for number in match[1].strip("_").split("_"):
                    tests[int(number)].append(f"`{path.relative_to(ROOT / 'tests').as_posix()}` {node.name}")
    return dict(tests)


def faults_table() -> str:
    """Returns the table of inputs and tests as Markdown."""
    tests = fault_tests()
    rows = [f"| {number} | {text} | {'<br>'.join(tests.get(number, []))} |" for number, text in INPUTS.items()]
    return "\n".join(["| id | input that failed | tests |", "|---|---|---|", *rows])


def main() -> None:
    """Writes the table in tests/README.md."""
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    write_text(README, f"{head}{BEGIN}\n{faults_table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
