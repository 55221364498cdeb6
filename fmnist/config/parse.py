"""A Config from YAML files and dotted flags; a mistake is one line that names the option."""

import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from fmnist.config import strict_yaml
from fmnist.config.conflicts import validate
from fmnist.config.schema import Config, flatten, to_yaml

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cnn.yaml"
SWITCHES = ("--dry_run", "--overwrite")
PRINT = "--print_config"

# jsonargparse's words, and ours: "optim.lr: expected float, got x".
_WORDS = (
    (r"Parser key \"([\w.]+)\"", r"\1"),
    (r"Does not validate .*?Subtypes: (.*?)\s+Errors:.*?\sGiven value: ", r"expected \1, got "),
    (r"Expected an? (.*?)\. Got value: ?", r"expected \1, got "),
    (r"<class '(\w+)'>", r"\1"),
    (r"typing\.Literal", ""),
)


class _Mistake(Exception):
    """What a user did wrong, in one line; no ValueError, which jsonargparse would take for its own."""


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise _Mistake, naming the nearest legal option where there is one."""
        line = str(ex or message)
        for theirs, ours in _WORDS:
            line = re.sub(theirs, ours, line, flags=re.DOTALL)
        if unknown := re.search(r"unrecognized arguments: --([\w.]+)|(?:Group '(\w+)' .*)?[Oo]ption '([\w.]+)'", line):
            line += _nearest(".".join(group for group in unknown.groups() if group))
        raise _Mistake(_one_line(line))


def _one_line(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 400 else f"{line[:300]} ... {line[-95:]}"


def _nearest(name: str) -> str:
    """Say which option or section was meant: the same name in another section, else the most similar one."""
    names = [*flatten(Config()), *Config.__dataclass_fields__]
    elsewhere = [known for known in names if "." in known and known.partition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, elsewhere or names, n=1, cutoff=0.0 if elsewhere else 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _check_names(content: Any, origin: object) -> None:
    """Refuse what is not a mapping of sections and options, before values are looked at."""
    if not isinstance(content, dict):
        raise _Mistake(f"{origin}: expected options by name, e.g. optim: {{lr: 0.001}}")
    defaults, seen = flatten(Config()), set()
    for key, value in _options(content, origin):
        if key in seen:  # optim: {lr: 1} beside optim.lr: 2
            raise _Mistake(f"{origin}: {key} is given twice")
        seen.add(key)
        if key not in defaults:
            raise _Mistake(f"{origin}: option {key[:100]} is not accepted{_nearest(key)}")
        if value is None and defaults[key] is not None:
            raise _Mistake(f"{origin}: {key} has no value")


def _options(content: dict[Any, Any], origin: object) -> Iterator[tuple[str, Any]]:
    sections = {name.partition(".")[0] for name in flatten(Config()) if "." in name}
    for key, value in content.items():
        if key not in sections:
            yield str(key), value
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            raise _Mistake(f"{origin}: {key} is {str(value)[:100]}; legal: options by name, {key}: {{...}}")


def _check_file(path: Path, origin: str) -> None:
    try:
        _check_names(strict_yaml.load_file(path), origin)
    except ValueError as error:
        raise _Mistake(f"{origin}: {error}") from None


def _check_section_flags(argv: list[str]) -> None:
    """Look at --optim '{lr: 0.1}' as at a file: jsonargparse would take what is no mapping for a file's name."""
    for i, arg in enumerate(argv):
        flag, assigned, value = arg.partition("=")
        section = flag.removeprefix("--")
        if flag.startswith("--") and hasattr(getattr(Config(), section, None), "__dataclass_fields__"):
            try:
                _check_names({section: strict_yaml.load(value if assigned else "".join(argv[i + 1 : i + 2]))}, flag)
            except yaml.YAMLError as error:
                raise _Mistake(f"{flag}: {error}") from None


def _parser(prog: str | None) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("strict_yaml", strict_yaml.load, (yaml.YAMLError,))
    # Options in full only: a misspelt one must not be taken for the beginning of another.
    parser = _Parser(
        prog=prog,
        description="Train an image classifier on Fashion-MNIST; see README.md.",
        parser_mode="strict_yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of options; later flags beat it.")
    parser.add_class_arguments(Config, None)
    return parser


def parse_config(argv: list[str] | None = None, prog: str | None = None) -> Config:
    """Read the command line into a Config; with no --config, configs/cnn.yaml comes first.

    Args:
        argv: arguments without the program's name; none takes sys.argv.
        prog: program name in messages.

    Raises:
        SystemExit: status 2 and one line on stderr for anything that is not legal; 0 after --help.
    """
    parser = _parser(prog)
    try:
        return _parse(parser, list(sys.argv[1:] if argv is None else argv))
    except (_Mistake, ValueError) as error:
        sys.stderr.write(f"{parser.prog}: error: {_one_line(str(error))}\n")
        raise SystemExit(2) from None


def _parse(parser: _Parser, argv: list[str]) -> Config:
    # Not the parser's own, which would print values before they are looked at.
    printing, argv = PRINT in argv, [arg for arg in argv if arg != PRINT]
    for i, arg in reversed(list(enumerate(argv))):  # a bare --dry_run means true
        if arg in SWITCHES and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            argv.insert(i + 1, "true")
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    files = [
        Path(argv[i + 1] if arg == "--config" else arg.partition("=")[2])
        for i, arg in enumerate(argv)
        if arg.startswith("--config=") or (arg == "--config" and i + 1 < len(argv))
    ]
    for file in files:
        _check_file(file, f"--config {file}")
    _check_section_flags(argv)
    # env=False: else JSONARGPARSE_DEFAULT_ENV would let any variable of the environment set an option.
    cfg = _to_config(parser, parser.parse_args(argv, env=False))
    if cfg.output_dir is None:
        cfg = replace(cfg, output_dir=f"runs/{files[-1].stem}")
    validate(cfg)
    if printing:
        print(to_yaml(cfg), end="")
        raise SystemExit(0)
    return cfg


def _to_config(parser: _Parser, namespace: Any) -> Config:
    built = parser.instantiate(namespace)
    return Config(**{name: getattr(built, name) for name in Config.__dataclass_fields__})


def load_config(path: Path) -> Config:
    """Read a run's config.yaml.

    Raises:
        ValueError: the file is missing or holds an option or value that is not legal.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a run directory of train.py")
    parser = _parser(None)
    try:
        _check_file(path, path.name)
        cfg = _to_config(parser, parser.parse_path(path, env=False, defaults=True))
        validate(cfg)
    except (_Mistake, ValueError) as error:
        raise ValueError(f"{path} does not hold a config of this version: {_one_line(str(error))}") from None
    return cfg
