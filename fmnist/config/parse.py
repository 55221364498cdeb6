"""A Config from YAML files and dotted flags; a mistake is one line that names the option."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_origin

from fmnist.config import strict_yaml
from fmnist.config.conflicts import validate
from fmnist.config.first_look import look, misplaced
from fmnist.config.schema import OPTIONS, SECTIONS, Config, convert, flatten, meanings, to_yaml, type_name, unflatten
from fmnist.config.shipped import find_recipe, shipped

DEFAULT_CONFIG = shipped("configs/cnn.yaml")
SYNONYMS = {  # what other programs call our options
    "learning_rate": "optim.lr",
    "batch_size": "batch.global_batch_size",
    "batch.size": "batch.global_batch_size",
}
USAGE = """%(prog)s [--config FILE ...] [--SECTION.FIELD VALUE ...] [--dry_run]
       %(prog)s --help | --print_config [same options]"""
DESCRIPTION = """\
Train an image classifier. Flags override --config files; later files and later flags override earlier ones.

recipes   --config configs/NAME.yaml, with NAME: {recipes}
models    --model.name mlp, cnn, hybrid, wide_resnet, or any timm classifier, e.g. resnet18, convnext_tiny
          (all of them: python -c "import timm; print(*timm.list_models())")
examples  accelerate launch train.py --config configs/mlp.yaml --optim.lr 0.002 --output_dir runs/mlp_lr2
          accelerate launch train.py --model.name resnet18 --augment '{{size: 32, flip: 0}}' --output_dir runs/resnet18

The defaults below are those of {files}. Another --config takes its place."""


def parse_config(argv: list[str] | None = None, prog: str | None = None, *, to_run: bool = True) -> Config:
    """Read the command line into a Config; without --config, configs/cnn.yaml comes first.

    Args:
        argv: arguments without the program's name; None takes sys.argv.
        prog: program name in messages.
        to_run: what the options name has to be there.

    Raises:
        SystemExit: status 2 and one line on stderr for a mistake; 0 after --help and --print_config.
    """
    options = flatten(Config())
    parser = _parser(prog, options)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_unknown(unknown[0].partition("=")[0]))
        files = args.config or [str(DEFAULT_CONFIG)]
        elsewhere = ""
        for file in files:
            with _origin(f"--config {file}"):
                content = _load(file)
                options = update(options, later := _read(content))
                elsewhere = misplaced(Path(file), content) if "output_dir" in later else elsewhere
        if args.help:
            _parser(prog, options, " and ".join(files)).print_help()
            raise SystemExit(0)
        flags: dict[str, Any] = {}
        for name, text in args.flags or []:
            flags |= _read({name: _flag_value(name, text)})
        options = update(options, flags)
        if options["output_dir"] is None:
            options["output_dir"] = f"runs/{Path(files[-1]).stem}"
        for name in ("output_dir", "model.weights"):  # a shell leaves --output_dir=~/x as it is
            if isinstance(options[name], str):
                options[name] = os.path.expanduser(options[name])
        validate(cfg := unflatten(options), [name for name, _ in args.flags or []])
        if to_run and not args.print_config:
            if elsewhere and "output_dir" not in flags:
                raise ValueError(elsewhere)
            look(cfg)
    except (argparse.ArgumentError, ValueError) as error:
        sys.stderr.write(f"{parser.prog}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    if args.print_config:
        print(to_yaml(cfg), end="")
        raise SystemExit(0)
    return cfg


def update(options: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return options with later ones, by dotted name, in their place; `model.options` of another model go with it."""
    another = later.get("model.name", options["model.name"]) != options["model.name"]
    return options | ({"model.options": {}} if another else {}) | later


def load_config(path: Path) -> Config:
    """Read a run's config.yaml.

    Raises:
        ValueError: the file is missing or holds an option or value that is not valid.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a run directory of train.py")
    with _origin(f"{path} does not hold a config of this version"):
        validate(cfg := unflatten(flatten(Config()) | _read(strict_yaml.load_file(path))))
    return cfg


@contextmanager
def _origin(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _load(file: str) -> Any:
    path, meant = find_recipe(file), f"configs/{Path(file).stem}.yaml"
    if not os.path.exists(path) and os.path.isfile(find_recipe(meant)):
        raise ValueError(f"there is no such file (did you mean {meant}?)")
    return strict_yaml.load_file(path)


def _read(content: Any, section: str = "") -> dict[str, Any]:
    """Return the options of {section: {field: value}, "section.field": value} by dotted name, each of its type."""
    if not isinstance(content, dict):
        found = f"{section} is {content!r:.100}; " if section else ""
        named = isinstance(content, str) and f"{section}.name" in OPTIONS  # --model cnn
        meant = f" (did you mean {section}.name?)" if named else ""
        raise ValueError(f"{found}expected options by name, e.g. optim: {{lr: 0.001}}{meant}")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{section}.{key}" if section else str(key)
        if name not in (*SECTIONS, *OPTIONS):
            raise ValueError(_unknown(name))
        inner = _read(value, name) if name in SECTIONS else {name: convert(name, value)}
        if twice := options.keys() & inner.keys():  # optim: {lr: 1} beside optim.lr: 2
            raise ValueError(f"{min(twice)} is given twice")
        options |= inner
    return options


def _flag_value(name: str, text: str) -> Any:
    kind = None if name in SECTIONS else OPTIONS[name].type
    if kind in (str, str | None) or get_origin(kind) is Literal:  # as it is: --output_dir runs/1e3
        return None if text == "null" else text
    with _origin(f"--{name}"):
        return strict_yaml.load(text if text.strip() else "''")  # a script's empty variable is not null


def _unknown(name: str) -> str:
    """Say that there is no such option, and which was meant.

    That is what other programs call so, else a similar field of its section, the same one elsewhere, a similar name.
    """
    if name.endswith((".yaml", ".yml")) and not name.startswith("-"):
        return f"{name!r:.100} is no option (did you mean --config {name:.100}?)"
    names, meant = [*OPTIONS, *SECTIONS], name.lstrip("-").replace("-", "_")
    section, _, field = meant.rpartition(".")
    near = [SYNONYMS[called] for called in (meant, field) if called in SYNONYMS][:1]
    if not near and section in SECTIONS:
        fields = [known.partition(".")[2] for known in OPTIONS if known.startswith(f"{section}.")]
        near = [f"{section}.{known}" for known in difflib.get_close_matches(field, fields, n=1)]
    if not near:
        elsewhere = [known for known in names if "." in known and known.partition(".")[2] == field]
        near = difflib.get_close_matches(meant, elsewhere or names, n=1, cutoff=0.0 if elsewhere else 0.5)
    return f"option {name!r:.100} does not exist" + (f" (did you mean {near[0]}?)" if near else "")


def _parser(prog: str | None, defaults: dict[str, Any], origin: str = "") -> argparse.ArgumentParser:
    recipes = ", ".join(sorted(path.stem for path in DEFAULT_CONFIG.parent.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=USAGE,
        description=DESCRIPTION.format(recipes=recipes, files=origin),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt option must not be taken for the beginning of another
        add_help=False,  # help waits for the files, whose values it shows
        exit_on_error=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="Explain every option.")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file of options.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved options as YAML; do not train.")
    explained = meanings()
    groups = {name: parser.add_argument_group(f"{name}: {explained[name]}") for name in SECTIONS}
    for name in (*SECTIONS, *OPTIONS):
        # all in one list, in the order given: --optim '{lr: 1}' --optim.lr 2
        flag: dict[str, Any] = {"dest": "flags", "action": "append", "type": lambda text, name=name: (name, text)}
        flag |= {"metavar": "'{FIELD: VALUE, ...}'", "help": "Several of the options below."}
        if name in OPTIONS:
            default = defaults[name] if isinstance(defaults[name], str) else json.dumps(defaults[name])
            flag["help"] = f"{explained[name]} (default: {default})".replace("%", "%%")
            flag["metavar"] = type_name(OPTIONS[name].type)
            if OPTIONS[name].type is bool:
                flag |= {"nargs": "?", "const": "true"}  # a bare --dry_run
        groups.get(name.partition(".")[0], parser).add_argument(f"--{name}", **flag)
    return parser
