"""Freeze the protocol of a confirming run, or say what changed since: `python -m lib.pipeline.protocol`.

A protocol is fixed before its run: claims, statistics, checks, budgets and seeds, in a commit that
lib/report/protocol.yaml names. Every record says under which protocol it was made and which frozen files differed
(`lib.utils.protocol`). A profile whose run comes later is added with a commit of its own, which fixes its settings: its
run meets the same claims and checks, and the report says what had been seen by then.
"""

import argparse
import time
from collections.abc import Iterable
from typing import Any

from lib.pipeline.provenance import git_state, run_git
from lib.utils.files import ROOT, write_text
from lib.utils.processes import print_in_any_locale
from lib.utils.protocol import PROTOCOL, file_hash, read_protocol, text_hash
from lib.utils.yaml_files import dump_yaml

PROTOCOL_HEADER = "# Written by `python -m lib.pipeline.protocol`; seeds, earlier and which files are by hand.\n"
CHANGE_REMEDY = 'freeze a new protocol (`python -m lib.pipeline.protocol --freeze "protocol 2"`) or restore the file'


def committed_hash(commit: str, name: str) -> str | None:
    """Return the hash of a file's text in a commit, None where the commit or the file in it is unknown."""
    content, errors = run_git("show", f"{commit}:{name}")
    return None if errors and not content else text_hash(content)


def hashes_now(files: Iterable[str]) -> dict[str, Any]:
    """Return the current commit, today's date and the hashes of files.

    Raises ValueError without a commit, and for files whose text is not the commit's.
    """
    commit, dirty = git_state()
    if dirty is None:
        raise ValueError(f"expected a repository with a commit, got {commit}: commit the frozen files first")
    hashes = {file: committed_hash(commit, file) for file in files}
    if wrong := [file for file, known in hashes.items() if known is None or known != file_hash(ROOT / file)]:
        raise ValueError(
            f"expected the frozen files of commit {commit[:7]}, got others: commit {', '.join(wrong)} first"
        )
    return {"commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime()), "files": hashes}


def write_protocol(protocol: dict[str, Any]) -> dict[str, Any]:
    """Write the protocol and return it."""
    protocol.pop("changed", None)
    write_text(ROOT / PROTOCOL, PROTOCOL_HEADER + dump_yaml(protocol))
    return protocol


def freeze(name: str) -> dict[str, Any]:
    """Write a protocol of this name with all files as they are in the current commit, and return it.

    Raises ValueError without a commit, and for frozen files whose text is not the commit's.
    """
    protocol = read_protocol()
    protocol |= {"name": name} | hashes_now(protocol["files"])
    protocol.pop("additions", None)  # their files are among the others
    return write_protocol(protocol)


def add_profile(profile: str) -> dict[str, Any]:
    """Freeze the settings of one more profile as they are in the current commit; return the protocol.

    Raises ValueError for a profile that is frozen already, without seeds in the protocol, without a commit, and for
    frozen files that changed or whose text is not the commit's.
    """
    protocol, file = read_protocol(), f"profiles/{profile}.yaml"
    if changed := protocol["changed"]:
        raise ValueError(f"expected {protocol['name']} as it was frozen, got changes to {', '.join(changed)}")
    if file in protocol["files"]:
        raise ValueError(f"expected a profile that is not frozen yet, got {profile!r}")
    if not protocol["seeds"].get(profile):
        raise ValueError(f"expected seeds of profile {profile!r} in {PROTOCOL}, got none: write them there first")
    added = hashes_now([file])
    protocol["files"] |= added.pop("files")
    protocol["additions"] = protocol.get("additions", []) + [{"profile": profile} | added]
    return write_protocol(protocol)


def main(arguments: list[str] | None = None) -> None:
    """Print the protocol and which frozen files changed since, exit 1 if any did; or freeze a new one, or add to it."""
    print_in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline.protocol", description=main.__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--freeze", metavar="NAME", help="fix the frozen files as they are in the current commit")
    action.add_argument("--add", metavar="PROFILE", help="fix the settings of one more profile before its run")
    args = parser.parse_args(arguments)
    try:
        if args.freeze is not None:
            protocol = freeze(args.freeze)
        else:
            protocol = read_protocol() if args.add is None else add_profile(args.add)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(f"{protocol['name']}, commit {protocol['commit']}, {protocol['date']}, {len(protocol['files'])} frozen files")
    if changed := protocol.get("changed"):
        raise SystemExit(f"changed since: {', '.join(changed)}: {CHANGE_REMEDY}")


if __name__ == "__main__":
    main()
