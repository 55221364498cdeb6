"""YAML as configs need it: plain values only, each key once, and every written value reads back the same."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_LENGTH = 1 << 16  # characters; a recipe has about one thousand; PyYAML takes half a second for this many
MAX_DEPTH = 20
# As in YAML 1.2: on, off and 12:30 are text, 1e-3 is a number.
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|nan)\Z")
WORDS = {"": None, "~": None} | {form: value for word, value in (("null", None), ("true", True), ("false", False))
                                 for form in (word, word.capitalize(), word.upper())}  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Quote text that `load` or a YAML 1.1 reader would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


def dump(value: Any) -> str:
    """Return plain values as YAML that `load`, and a YAML 1.1 reader too, read back the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def load_file(path: Path) -> Any:
    """Read one YAML file as `load` does; ValueError where it is not a regular file of text."""
    try:
        if not path.is_file():  # a pipe would block, a device never end
            kind = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else ""
            raise ValueError(f"{kind}, not a file of options" if kind else "there is no such file")
        with path.open(encoding="utf-8-sig") as file:
            return load(file.read(MAX_LENGTH + 1))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def load(text: str) -> Any:
    """Return one YAML document as dicts (keys: text or integers), lists, text, numbers, booleans and None.

    Raises:
        ValueError: not YAML, or a tag, an anchor, a key given twice, too long or too deeply nested; one line.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH:,} characters")
    try:  # syntax alone: nothing is constructed from a tag
        values = yaml.NodeEvent, yaml.CollectionEndEvent  # not the marks of streams and documents
        events = (event for event in yaml.parse(text, Loader=yaml.BaseLoader) if isinstance(event, values))
        documents = [_read(first, events, 0) for first in events]  # _read takes the events that belong to its first
        if len(documents) > 1:
            raise ValueError("there is another document after the first")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error)
        raise ValueError(" ".join(problem.split())) from error
    return documents[0] if documents else None


def _read(event: Any, events: Iterator[Any], depth: int) -> Any:
    line = f"line {event.start_mark.line + 1}"
    if event.anchor is not None:
        raise ValueError(f"{line}: anchors and aliases are not accepted")
    if event.tag is not None:
        raise ValueError(f"{line}: tag {event.tag!r} is not accepted")
    if depth > MAX_DEPTH:
        raise ValueError(f"{line}: nested deeper than {MAX_DEPTH}")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value  # quoted: text
    items = []
    while not isinstance(inner := next(events), yaml.CollectionEndEvent):
        items.append(_read(inner, events, depth + 1))
    if isinstance(event, yaml.SequenceStartEvent):
        return items
    mapping: dict[str | int, Any] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise ValueError(f"{line}: a key is neither text nor an integer")
        if key in mapping:
            raise ValueError(f"{line}: key {key!r} is given twice")
        mapping[key] = value
    return mapping


def _scalar(text: str) -> Any:
    if not NUMBER.match(text):
        return WORDS.get(text, text)
    return int(text) if text.lstrip("+-").isdecimal() else float(re.sub(r"\.(?=inf|nan)", "", text))
