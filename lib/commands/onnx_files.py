"""Purifiers and classifiers as ONNX files, which take their noise as an input: written, compared with torch, and run.

A file's inputs are `x`, images (n, c, h, w) in [0, 1], and for a purifier `noise`, standard normal numbers
(k, n, c, h, w): one image of noise for each of its k draws. They are whoever runs the file's to draw, anew in every
call, so that the defence stays random and an attack can average over it. Outputs: `y`, purified images cut to [0, 1];
`logits`, of the purified images as they were before that cut, which is what every evaluation here measures.
"""

import hashlib
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from jaxtyping import Float
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from lib import pretrained
from lib.commands.named import purifier_place
from lib.diffusion.network import load_facts
from lib.pipeline.provenance import git_state
from lib.purify import Purifier, load_purifier
from lib.utils.files import read_json
from lib.utils.random_state import randn_like
from lib.utils.seeds import seeded_generator
from lib.utils.specs import PurifierSpec

OPSET = 18
MOST_EVALUATIONS = 20  # of a network: each is a copy of its operators in the file
PARITY = 1e-4  # largest difference of any output from torch
PARITY_BATCHES = (1, 3, 17)
QUANTIZED = ("MatMul", "Conv")  # operators whose weights int8 files store as 8-bit numbers


class OnnxParts(nn.Module):
    """A purifier, a classifier or both, as a function of images and noise: what is written to a file.

    Args:
        purifier: which does not cut its images; None for none.
        classifier: logits of images; None for none.
        shape: of an image (c, h, w).
        about: what the file says of them, as text.
    """

    def __init__(
        self, purifier: Purifier | None, classifier: nn.Module | None, shape: tuple[int, ...], about: dict[str, str]
    ) -> None:
        super().__init__()
        self.purifier, self.classifier, self.shape, self.about = purifier, classifier, shape, about
        self.draws = 0 if purifier is None else count_draws(purifier, shape)

    @property
    def outputs(self) -> list[str]:
        parts = {"y": self.purifier, "logits": self.classifier}
        return [name for name, part in parts.items() if part is not None]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        out, y = [], x
        if self.purifier is not None and noise is not None:
            draws = iter(noise.unbind(0))
            y = self.purifier(x, lambda like: next(draws))
            out.append(y.clamp(0, 1))
        if self.classifier is not None:
            out.append(self.classifier(y))
        return tuple(out)


def count_draws(purifier: Purifier, shape: tuple[int, ...]) -> int:
    """Return how many images of noise a purifier draws for one image of a shape (c, h, w)."""
    draws = Counter()
    noise = randn_like(seeded_generator(0, "onnx"))

    def counted(like: Tensor) -> Tensor:
        draws["noise"] += 1
        return noise(like)

    with torch.no_grad():
        purifier(torch.full((1, *shape), 0.5), counted)
    return draws["noise"]


def classifier_part(name: str) -> tuple[nn.Module, tuple[int, ...], dict[str, str]]:
    """Return a classifier of the repository, the shape of its images and what its card says."""
    net = pretrained.load_classifier(name)
    card = read_json(pretrained.pretrained_folder(name) / pretrained.CARD)
    network = card["network"]
    about = {"classifier": name, "classifier sha256": card["sha256"], "classifier measured": card["limits"]}
    return net, (network["in_channels"], network["size"], network["size"]), about


def purifier_part(name: str) -> tuple[Purifier, tuple[int, ...], dict[str, str]]:
    """Return a purifier by name, see `lib.commands.named.purifier_place`, the shape of its images and its facts.

    Raises ValueError for one of more than `MOST_EVALUATIONS` evaluations.
    """
    models, spec = purifier_place(name)
    purifier = load_purifier(models, spec, clamp=False)
    if purifier.evaluations > MOST_EVALUATIONS:
        expected = f"expected at most {MOST_EVALUATIONS} evaluations of a network, whose operators a file repeats"
        raise ValueError(f"{expected} for each, got {purifier.evaluations} of {name}")
    kind = str(PurifierSpec.parse(spec).network)
    folder = next(models / n for n in (spec, kind, "teacher") if (models / n).is_dir())
    weights = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.glob("*.safetensors")))).hexdigest()
    measured = load_facts(folder).get("about", {}).get("limits", "not stated")
    config: Any = purifier.net.config
    about = {
        "purifier": name,
        "purifier sha256": weights,
        "purifier measured": measured,
        "evaluations": str(purifier.evaluations),
    }
    return purifier, (config.in_channels, config.sample_size, config.sample_size), about


def named_parts(name: str, classifier: str | None = None) -> OnnxParts:
    """Return what a name stands for, ready for export.

    Args:
        name: of a classifier that comes with the repository (digits/natural), or of a purifier (digits/adaptive-1, or
            FOLDER/adaptive-1).
        classifier: of the repository, behind the purifier; None for none.

    Returns:
        The parts, on the CPU.

    Raises:
        FileNotFoundError: for a name that is not there.
        ValueError: for a classifier behind a classifier, images of two shapes, and purifiers of too many evaluations.
    """
    own = pretrained.pretrained_folder(name) / pretrained.CARD if name.count("/") == 1 else None
    facts = {"name": name, "data set": name.partition("/")[0], "commit": git_state()[0]}
    if own is not None and own.is_file():
        if classifier is not None:
            raise ValueError(f"expected a purifier before --classifier {classifier}, got the classifier {name}")
        net, shape, about = classifier_part(name)
        return OnnxParts(None, net, shape, facts | about)
    purifier, shape, about = purifier_part(name)
    if classifier is None:
        return OnnxParts(purifier, None, shape, facts | about)
    net, wanted, more = classifier_part(classifier)
    if wanted != shape:
        raise ValueError(f"expected a classifier of images {shape}, as {name} purifies, got {wanted} for {classifier}")
    return OnnxParts(purifier, net, shape, facts | about | more)


def random_inputs(parts: OnnxParts, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return n random images, about a fifth of their pixels black and as many white, and noise where parts take it."""
    rng = seeded_generator(seed, f"onnx/{n}")
    x = (1.6 * torch.rand((n, *parts.shape), generator=rng) - 0.3).clamp(0, 1)
    return (x, torch.randn((parts.draws, n, *parts.shape), generator=rng)) if parts.draws else (x,)


def onnx_bytes(parts: OnnxParts) -> bytes:
    """Return an ONNX file of parts, for batches of any size.

    The graph is that of one image: torch's tracer takes lengths for constants, and levels of noise for one image suit
    any number.
    """
    inputs = random_inputs(parts, 1)
    names = ["x", "noise"][: len(inputs)]
    axes = {"x": {0: "n"}, "noise": {1: "n"}} | {name: {0: "n"} for name in parts.outputs}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        path = Path(folder) / "model.onnx"
        warnings.simplefilter("ignore")  # of constants in the trace, which `parity` checks, and of the exporter's age
        torch.onnx.export(
            parts.eval(),
            inputs,
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=parts.outputs,
            dynamic_axes={name: axis for name, axis in axes.items() if name in (*names, *parts.outputs)},
        )
        model = onnx.load(path)
    model.doc_string = (__doc__ or "").partition("\n\n")[2].strip()
    onnx.helper.set_model_props(model, parts.about | {"draws": str(parts.draws)})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def quantized_bytes(content: bytes) -> bytes:
    """Return the file with 8-bit weights of `QUANTIZED` operators, whose inputs are rounded when it runs.

    onnxruntime's dynamic quantisation: a scale for each tensor, unsigned numbers, as its convolution on CPUs takes no
    others. What is a `Gemm` becomes a `MatMul` first. All else stays float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(content)
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # its advice to optimise first, which changes nothing here
        try:
            quantize_dynamic(source, target, op_types_to_quantize=list(QUANTIZED), weight_type=QuantType.QUInt8)
        finally:
            logging.disable(disabled)
        model, before = onnx.load(target), onnx.load_from_string(content)
    about = {entry.key: entry.value for entry in before.metadata_props}
    onnx.helper.set_model_props(model, about | {"int8": f"weights of {' and '.join(QUANTIZED)}, by onnxruntime"})
    model.doc_string = before.doc_string
    return model.SerializeToString()


def quantized_share(content: bytes) -> dict[str, str]:
    """Return, by kind of operator, how many of those with weights an int8 file computes with 8-bit numbers."""
    kinds = Counter(node.op_type for node in onnx.load_from_string(content).graph.node)
    pairs = {"Conv": "ConvInteger", "MatMul": "MatMulInteger", "Gemm": ""}
    return {
        kind: f"{kinds[integer]} of {kinds[integer] + kinds[kind]}"
        for kind, integer in pairs.items()
        if kinds[integer] + kinds[kind]
    }


class OnnxFile(nn.Module):
    """An ONNX file as a model: logits of images with noise from the global random state, which attacks seed.

    Args:
        content: the file itself, or its path.
        threads: of one operator; 0 for as many as there are cores.

    Raises:
        ValueError: for what onnxruntime cannot read; at a call, for a file without logits.
    """

    independent_noise = True  # each image of a batch has its own

    def __init__(self, content: bytes | Path, threads: int = 0) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        source = content if isinstance(content, bytes) else str(content)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            shown = "the bytes" if isinstance(content, bytes) else content
            raise ValueError(f"expected an ONNX file, got {shown}: {' '.join(str(error).split())[:120]}") from None
        self.about: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.draws = int(self.about.get("draws", 0))

    def run(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, for images and, where the file takes it, noise."""
        names = [entry.name for entry in self.session.get_inputs()]
        feeds = {name: t.detach().cpu().numpy() for name, t in zip(names, inputs, strict=True)}
        answers: Any = self.session.run(None, feeds)
        return {name: torch.from_numpy(np.asarray(a)) for name, a in zip(self.outputs, answers, strict=True)}

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        if "logits" not in self.outputs:
            raise ValueError(f"expected a file with logits, got {self.about.get('name', 'one')} without a classifier")
        noise = [torch.stack([torch.randn_like(x) for _ in range(self.draws)])] if self.draws else []
        return self.run(x, *noise)["logits"].to(x.device)


class Parity(NamedTuple):
    """Largest difference of outputs from torch's, and how many images were compared."""

    difference: float
    images: int


@torch.no_grad()
def parity(file: OnnxFile, parts: OnnxParts, seed: int = 0, rounds: int = 4) -> Parity:
    """Compare a file with torch on random images and noises, in batches of several sizes.

    Args:
        file: of the parts.
        parts: what it was written from.
        seed: of images and noises.
        rounds: batches of each size of `PARITY_BATCHES`.

    Returns:
        The largest difference; infinity where an answer has another shape or is not finite.
    """
    worst, images = 0.0, 0
    for k in range(rounds):
        for n in PARITY_BATCHES:
            inputs = random_inputs(parts, n, seed + k)
            try:
                answers = file.run(*inputs).values()
            except Exception:  # onnxruntime's own kinds: a graph of one size of batch
                return Parity(float("inf"), images)
            for ours, theirs in zip(parts(*inputs), answers, strict=True):
                same = ours.shape == theirs.shape and bool(theirs.isfinite().all())
                worst = max(worst, (ours - theirs).abs().max().item() if same else float("inf"))
            images += n
    return Parity(worst, images)
