"""The frozen protocol: what lib/report/protocol.yaml says was fixed before the confirming run, and what changed since.

`python -m lib.pipeline.protocol` freezes and compares. Needs neither git nor torch.
"""

import hashlib
from pathlib import Path
from typing import Any

from lib.utils.files import ROOT
from lib.utils.yaml_files import read_mapping

PROTOCOL = Path("lib/report/protocol.yaml")


def text_hash(content: bytes) -> str:
    """Return the SHA-256 of a file's text, line ends as LF."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def file_hash(path: Path) -> str | None:
    """Return the hash of a file's text, None where there is no file."""
    return text_hash(path.read_bytes()) if path.is_file() else None


def read_protocol(root: Path = ROOT) -> dict[str, Any]:
    """Return the frozen protocol below `root`, and under "changed" the frozen files whose text differs now.

    A file that is missing counts as changed. Raises ValueError where there is no protocol to read.
    """
    protocol = read_mapping(root / PROTOCOL)
    return protocol | {
        "changed": [name for name, known in protocol["files"].items() if file_hash(root / name) != known]
    }


def protocol_state(root: Path = ROOT) -> dict[str, Any]:
    """Return what a record says of the protocol that it was made under: its name, its commit and what changed since."""
    protocol = read_protocol(root)
    return {key: protocol[key] for key in ("name", "commit", "changed")}
