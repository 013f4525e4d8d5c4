"""YAML as people mean it: the loader and dumper behind `rlhf.config`.

PyYAML follows YAML 1.1, in which `1e-3` is a string, `no` is false, `010` is eight and `1:30` is ninety. Here scalars
follow YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), and a key given twice is refused instead of dropped.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

INTEGER = re.compile(r"^[-+]?[0-9][0-9_]*$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


class Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's scalars that refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build the mapping; a key given twice is an error, since only one of them could count."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Read an integer in base ten, also with leading zeros; underscores group digits."""
        return int(node.value.replace("_", ""))


class Dumper(yaml.SafeDumper):
    """A safe dumper that quotes every string which `Loader`, or a reader of YAML 1.1, would take for something else."""


# Lists of the characters that a scalar of each kind may begin with; PyYAML looks resolvers up by them.
for _tag, _pattern, _first in (
    ("bool", BOOLEAN, "tTfF"),
    ("int", INTEGER, "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("null", NULL, ["~", "n", "N", ""]),
    ("merge", re.compile(r"^<<$"), "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    if _tag in ("int", "float"):  # The others are the dumper's own already.
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_decimal)
