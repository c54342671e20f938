"""Write a purifier or classifier as an ONNX file: `python -m lib export NAME OUT.onnx`, see `--help`."""

import argparse
from pathlib import Path

import torch

from lib.commands import onnx_files
from lib.utils.files import check_writable, shown_path, write_bytes


def int8_path(path: Path) -> Path:
    """Return the path of the int8 file beside a file."""
    return path.with_suffix(".int8.onnx")


def check_parity(file: onnx_files.OnnxFile, parts: onnx_files.OnnxParts) -> onnx_files.Parity:
    """Return how far a file is from torch; ValueError above `lib.commands.onnx_files.PARITY`."""
    compared = onnx_files.parity(file, parts)
    if not compared.difference <= onnx_files.PARITY:
        expected = f"expected outputs within {onnx_files.PARITY:g} of torch's, got {compared.difference:.3g}"
        raise ValueError(f"{expected} over {compared.images} random images: nothing was written")
    return compared


@torch.no_grad()
def same_class(file: onnx_files.OnnxFile, other: onnx_files.OnnxFile, parts: onnx_files.OnnxParts, n: int) -> float:
    """Return the share of n random images and noises to which two files answer the same class."""
    inputs = onnx_files.random_inputs(parts, n, seed=1)
    one, two = (f.run(*inputs)["logits"].argmax(-1) for f in (file, other))
    return (one == two).float().mean().item()


def main() -> int:
    """Write a purifier, a classifier, or a purifier before a classifier as an ONNX file, and compare it with torch.

    Inputs: x, images (n, c, h, w) in [0, 1], and noise (k, n, c, h, w), standard normal, to be drawn anew in every call
    and independently for each image. Outputs: y, purified images, and logits. Nothing is written unless all outputs are
    within 1e-4 of torch's on random images and noises, in batches of 1, 3 and 17.
    """
    parser = argparse.ArgumentParser(prog="python -m lib export", description=main.__doc__)
    parser.add_argument("name", metavar="NAME", help="digits/adaptive-1, FOLDER/cd-2, or a classifier: digits/natural")
    parser.add_argument("target", metavar="OUT.onnx", type=Path, help="the file to write")
    parser.add_argument("--classifier", help="of this repository, behind the purifier: adds its logits")
    parser.add_argument("--int8", action="store_true", help="also write OUT.int8.onnx, with 8-bit weights")
    args = parser.parse_args()
    if args.target.suffix != ".onnx":
        raise ValueError(f"expected a file name that ends in .onnx, got {shown_path(args.target)}")
    for path in (args.target, int8_path(args.target)):
        check_writable(path)
    parts = onnx_files.named_parts(args.name, args.classifier)
    content = onnx_files.onnx_bytes(parts)
    file = onnx_files.OnnxFile(content)
    compared = check_parity(file, parts)
    write_bytes(args.target, content)
    inputs = f"x (n, {', '.join(map(str, parts.shape))})"
    inputs += f" and noise ({parts.draws}, n, {', '.join(map(str, parts.shape))})" if parts.draws else ""
    print(f"{shown_path(args.target)}: {inputs} to {' and '.join(parts.outputs)}, {len(content) / 1000:.0f} kB")
    print(f"  at most {compared.difference:.1e} from torch over {compared.images} random images")
    if args.int8:
        small = onnx_files.quantized_bytes(content)
        write_bytes(int8_path(args.target), small)
        done = ", ".join(f"{share} {kind}" for kind, share in onnx_files.quantized_share(small).items())
        print(f"{shown_path(int8_path(args.target))}: 8-bit weights in {done}, {len(small) / 1000:.0f} kB")
        quantized = onnx_files.OnnxFile(small)
        apart = onnx_files.parity(quantized, parts).difference
        agree = f", same class on {same_class(file, quantized, parts, 512):.1%}" if "logits" in parts.outputs else ""
        print(f"  at most {apart:.1e} from torch over {compared.images} random images{agree}: not the same model")
    return 0
