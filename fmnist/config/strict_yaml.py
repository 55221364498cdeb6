"""YAML as configs need it: plain values only, each key once, and what is written reads back the same."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 16  # a recipe has about one thousand; PyYAML takes half a second for this many
MAX_DEPTH = 20
# As YAML 1.2 has it: on, off and 12:30 are text, 1e-3 is a number.
FLOAT = re.compile(r"[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)")
INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+")


class _Loader(yaml.SafeLoader):
    """Refuse what can surprise: tags, anchors, merge keys, a key given twice, deep nesting."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not accepted", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(None, None, f"tag {event.tag!r} is not accepted", event.start_mark)
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {MAX_DEPTH}", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise yaml.MarkedYAMLError(None, None, "a key is neither text nor a whole number", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        if INT.fullmatch(node.value):
            digits = node.value.lower()
            return int(digits, 16) if digits.startswith("0x") else int(digits)
        return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


class _Dumper(yaml.SafeDumper):
    """PyYAML's own, which quotes what YAML 1.1 takes for another type, and what `_Loader` does."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBER = re.compile(rf"(?:{FLOAT.pattern}|{INT.pattern})\Z")
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("tag:fmnist,number", _NUMBER, list("-+0123456789.")),
):
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:fmnist,number", _Loader.construct_number)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def load(text: str) -> Any:
    """Read one YAML document of plain values.

    Args:
        text: at most MAX_BYTES characters.

    Returns:
        dicts with text or whole numbers as keys, lists, text, numbers, booleans, None.

    Raises:
        yaml.YAMLError: not YAML, or a tag, an anchor, a key given twice, too long or too deeply nested.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"larger than {MAX_BYTES:,} bytes")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:  # without the excerpt, which would fill the line
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise yaml.YAMLError(f"{where}{error.problem or error.context}") from error
    except ValueError as error:  # a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from error


def load_file(path: Path) -> Any:
    """Read one YAML file.

    Raises:
        ValueError: no such file, too large, not text, or not legal for `load`; one line.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        return load(data.decode("utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump(value: Any) -> str:
    """Return plain values as YAML that `load`, and a YAML 1.1 reader too, read back the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
