"""A Config from YAML files and dotted flags; a mistake is one line that names the option."""

import difflib
import re
import sys
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from fmnist.config import Config, flatten, validate

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "cnn.yaml"
MAX_YAML_BYTES = 1 << 20


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line on stderr and status 2, naming the nearest legal option where there is one."""
        line = " ".join(str(ex or message).split())
        if unknown := re.search(r"unrecognized arguments: --([\w.]+)|(?:Group '(\w+)' .*)?[Oo]ption '([\w.]+)'", line):
            name = ".".join(group for group in unknown.groups() if group)
            if near := difflib.get_close_matches(name, list(flatten(Config())), n=1, cutoff=0.5):
                line += f" (did you mean {near[0]}?)"
        sys.stderr.write(f"{self.prog}: error: {line[:400]}\n")
        raise SystemExit(2)


def _parser(prog: str | None) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, description="Train an image classifier on Fashion-MNIST; see README.md.")
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
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, arg in reversed(list(enumerate(argv))):  # a bare --dry_run means true
        if arg in ("--dry_run", "--overwrite") and argv[i + 1 : i + 2] not in (["true"], ["false"]):
            argv.insert(i + 1, "true")
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    parser = _parser(prog)
    config_names = [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--config"]
    config_names += [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    for name in config_names:
        if Path(name).is_file() and Path(name).stat().st_size > MAX_YAML_BYTES:
            parser.error(f"--config {name} is larger than {MAX_YAML_BYTES} bytes")
    namespace = parser.parse_args(argv)
    cfg = parser.instantiate(namespace)
    values = {name: getattr(cfg, name) for name in Config.__dataclass_fields__}
    if values["output_dir"] is None:
        values["output_dir"] = f"runs/{Path(config_names[-1]).stem}"
    cfg = Config(**values)
    try:
        validate(cfg)
    except ValueError as error:
        parser.error(str(error))
    return cfg


def load_config(path: Path) -> Config:
    """Read a run's config.yaml.

    Raises:
        ValueError: the file is missing or holds an option or value that is not legal.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a run directory of train.py")
    parser = _parser(None)
    try:
        namespace = parser.parse_path(path, defaults=True)
        built = parser.instantiate(namespace)
        cfg = Config(**{name: getattr(built, name) for name in Config.__dataclass_fields__})
        validate(cfg)
    except (SystemExit, UnicodeDecodeError):
        raise ValueError(f"{path} does not hold a config of this version") from None
    return cfg
