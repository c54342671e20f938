"""Freeze the protocol of a confirming run, or say what changed since: `python -m lib.pipeline.protocol`.

A protocol is fixed before its run: claims, statistics, checks, budgets and seeds, in a commit that
lib/report/protocol.yaml names. Every record says under which protocol it was made and which frozen files differed
(`lib.utils.protocol`).
"""

import argparse
import time
from typing import Any

from lib.pipeline.provenance import git_state, run_git
from lib.utils.files import ROOT, write_text
from lib.utils.processes import print_in_any_locale
from lib.utils.protocol import PROTOCOL, file_hash, read_protocol, text_hash
from lib.utils.yaml_files import dump_yaml

PROTOCOL_HEADER = (
    "# Written by `python -m lib.pipeline.protocol --freeze NAME`; seeds, earlier and which files are by hand.\n"
)
CHANGE_REMEDY = 'freeze a new protocol (`python -m lib.pipeline.protocol --freeze "protocol 2"`) or restore the file'


def committed_hash(commit: str, name: str) -> str | None:
    """Return the hash of a file's text in a commit, None where the commit or the file in it is unknown."""
    content, errors = run_git("show", f"{commit}:{name}")
    return None if errors and not content else text_hash(content)


def freeze(name: str) -> dict[str, Any]:
    """Write the protocol with this name, the current commit, today's date and the hashes of its files, and return it.

    Raises ValueError without a commit, and for frozen files whose text is not the commit's.
    """
    protocol, (commit, dirty) = read_protocol(), git_state()
    if dirty is None:
        raise ValueError(f"expected a repository with a commit, got {commit}: commit the frozen files first")
    hashes = {file: committed_hash(commit, file) for file in protocol["files"]}
    if wrong := [file for file, known in hashes.items() if known is None or known != file_hash(ROOT / file)]:
        raise ValueError(
            f"expected the frozen files of commit {commit[:7]}, got others: commit {', '.join(wrong)} first"
        )
    protocol |= {"name": name, "commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime()), "files": hashes}
    del protocol["changed"]
    write_text(ROOT / PROTOCOL, PROTOCOL_HEADER + dump_yaml(protocol))
    return protocol


def main(arguments: list[str] | None = None) -> None:
    """Print the frozen protocol and which of its files changed since, exit 1 if any did; or freeze a new one."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.protocol", description=main.__doc__)
    parser.add_argument("--freeze", metavar="NAME", help="fix the frozen files as they are in the current commit")
    args = parser.parse_args(arguments)
    try:
        protocol = read_protocol() if args.freeze is None else freeze(args.freeze)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(f"{protocol['name']}, commit {protocol['commit']}, {protocol['date']}, {len(protocol['files'])} frozen files")
    if changed := protocol.get("changed"):
        raise SystemExit(f"changed since: {', '.join(changed)}: {CHANGE_REMEDY}")


if __name__ == "__main__":
    main()
