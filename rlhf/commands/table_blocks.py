"""Tables inside a markdown file, each below the command that makes it, so that they are written and never typed.

<!-- rlhf table runs/on_policy/cartpole_* --row algorithm.preset --metric "greedy return=return_mean" -->
| ... |
<!-- end of table -->
"""

from __future__ import annotations

import argparse
import glob
import re
import shlex
from pathlib import Path

from rlhf.commands.tables import make_table
from rlhf.errors import UserError

BLOCK = re.compile(r"<!-- rlhf table (?P<arguments>.*?) -->\n(?P<table>.*?)<!-- end of table -->", re.DOTALL)


def update_tables(file: Path) -> list[str]:
    """Write every table of the file anew from the runs that its command names, relative to the current folder.

    Args:
        file: A markdown file.

    Returns:
        A sentence per block. A block none of whose runs is here keeps its table, and its sentence says so.

    Raises:
        UserError: No such file, no block in it, or a command that `make_table` refuses; the file is untouched then.
    """
    if not file.is_file():
        raise UserError("no such file", where=str(file))
    text = file.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise UserError("no table to update", where=str(file), expected="<!-- rlhf table RUN_DIR... -->")
    said: list[str] = []

    def replace(match: re.Match[str]) -> str:
        arguments = parse_block(match["arguments"], where=str(file))
        folders = [Path(path) for pattern in arguments.folders for path in sorted(glob.glob(pattern))]
        if not folders:
            said.append(f"kept, no such runs here: {' '.join(arguments.folders)}")
            return match[0]
        table = make_table(folders, metrics=arguments.metric, row=arguments.row)
        said.append(f"written from {len(folders)} folders: {' '.join(arguments.folders)}")
        return f"<!-- rlhf table {match['arguments']} -->\n{table}\n<!-- end of table -->"

    updated = BLOCK.sub(replace, text)
    file.write_text(updated, encoding="utf-8")
    return said


def parse_block(arguments: str, *, where: str) -> argparse.Namespace:
    """Read what stands behind `rlhf table` in a block: folders (patterns), `--metric`, `--row`.

    Raises:
        UserError: Anything else.
    """
    parser = argparse.ArgumentParser(prog="rlhf table", exit_on_error=False, add_help=False)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--metric", action="append")
    parser.add_argument("--row")
    try:
        known, unknown = parser.parse_known_args(shlex.split(arguments))
    except (argparse.ArgumentError, ValueError, SystemExit) as error:
        raise UserError(f"not a command of `rlhf table`: {error}", where=where, got=arguments) from error
    if unknown:
        raise UserError("unknown option of `rlhf table`", where=where, got=" ".join(unknown))
    return known
