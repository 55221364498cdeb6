"""Over 300 malformed configs and flags: status 2, one line that names the option, before torch, network or disk."""

import ast
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, execute
from hypothesis import given, settings
from hypothesis import strategies as st

from fmnist.config import strict_yaml
from fmnist.config.conflicts import validate
from fmnist.config.parse import load_config, parse_config
from fmnist.config.schema import OPTIONS, Config, LogConfig, ModelConfig, flatten, to_yaml
from fmnist.runtime.ownership import check_place

DEFAULTS = flatten(Config())
RANGES = {name: field.metadata["valid"] for name, field in OPTIONS.items() if "valid" in field.metadata}


def hint(name: str) -> str:
    """The type of an option as text, e.g. "int | None"."""
    return str(OPTIONS[name].type).replace("<class '", "").replace("'>", "")


def is_number(name: str) -> bool:
    return hint(name).startswith(("int", "float"))


def misspell(name: str) -> Iterator[str]:
    """One letter doubled, one left out, two exchanged: in the last word of the option."""
    section, dot, field = name.rpartition(".")
    middle = len(field) // 2
    for bad in (field + field[-1], field[:middle] + field[middle + 1 :], field[:-2] + field[-1] + field[-2]):
        if bad and f"{section}{dot}{bad}" not in DEFAULTS:
            yield f"{section}{dot}{bad}"


def bad_values(name: str) -> Iterator[tuple[str, Any]]:
    """(kind, value) of what no option of this type takes."""
    kind = hint(name)
    if name != "augment.size":
        yield "dict", {"x": {"y": 1}} if kind != "dict[str, typing.Any]" else [1]
    yield "list", [1, "x"] if "list[float]" in kind else [1, 2]
    if is_number(name):
        yield "wrong type", "many"
        yield "empty", ""
        yield "NaN", math.nan
        yield "huge", 10**30 if name in RANGES else [10**30]
        yield "infinite", -math.inf
    if name in RANGES:
        low, high = RANGES[name]
        yield "too high", high + 1
        yield "too low", low - 1
    if kind.startswith("int") and name != "augment.size":
        yield "fraction", 2.5
    if kind == "bool":
        yield "wrong type", "many"
        yield "number", 7
    if kind.startswith(("str", "typing.Literal")):
        yield "empty", ""
        yield "control characters", "a\x07b"
    if kind.startswith("typing.Literal"):
        yield "wrong word", "many"
    if kind.startswith("str"):
        yield "huge", "x" * 5000
        yield "blank", " "


def as_yaml(name: str, value: Any) -> str:
    section, _, field = name.rpartition(".")
    return strict_yaml.dump({section: {field: value}} if section else {field: value})


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that these flags give; anything else fails."""
    start = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        parse_config(list(argv), prog="train.py")
    assert time.monotonic() - start < 5
    out, err = capsys.readouterr()
    assert caught.value.code == 2, argv
    assert err.startswith("train.py: error: "), err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert len(err) < 600
    assert out == ""
    return err


def cases() -> list[tuple[str, str, Any]]:
    wrong = [(name, kind, value) for name in DEFAULTS for kind, value in bad_values(name)]
    return wrong + [(name, "misspelt", bad) for name in DEFAULTS for bad in misspell(name)]


def check(name: str, kind: str, value: Any, how: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, content = (value, 1) if kind == "misspelt" else (name, value)
    if how == "file":
        (folder / "bad.yaml").write_text(as_yaml(written, content))
        err = refused(capsys, "--config", str(folder / "bad.yaml"))
    else:
        text = strict_yaml.dump(content).removesuffix("\n...\n") if isinstance(content, list | dict) else str(content)
        err = refused(capsys, f"--{written}={text}")
    assert written in err, (name, kind, how, err)
    if kind == "misspelt":
        meant = re.search(r"did you mean ([\w.]+)\?", err)
        near = difflib.SequenceMatcher(None, value, name).ratio()  # beta11 is as near to the other beta
        assert meant and difflib.SequenceMatcher(None, value, meant[1]).ratio() >= near, err


def test_there_are_three_hundred() -> None:
    assert len(cases()[::2]) + len(BAD_YAML) >= 350


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_bad_option_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every second case, in a file and as a flag by turns; the others are in the slow form."""
    for i, case in enumerate(case for case in cases()[::2] if case[0] == name):
        check(*case, "file" if i % 2 else "flag", tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_bad_option_is_named_in_a_file_and_as_a_flag(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case in cases():
        if case[0] == name:
            for how in ("file", "flag"):
                check(*case, how, tmp_path, capsys)


LAUGHS = "model:\n  options:\n    a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"    {b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "run a command": ("seed: !!python/object/apply:os.system ['touch planted']", "tag"),
    "a Python name": ("model: {options: !!python/name:os.system }", "tag"),
    "a module": ("model: !!python/module:planted", "tag"),
    "a new object": ("model: !!python/object/new:planted.Planted {}", "tag"),
    "an own tag": ("model: !mine {name: cnn}", "tag"),
    "a date": ("seed: !!timestamp 2020-01-01", "tag"),
    "bytes": ("seed: !!binary aGk=", "tag"),
    "a set": ("model: {options: !!set {a, b}}", "tag"),
    "a billion laughs": (LAUGHS, "line 3: anchors"),
    "a list in itself": ("seed: &a [*a]", "anchors"),
    "an anchor": ("seed: &a 3\nlog: {every_steps: *a}", "anchors"),
    "an alias of nothing": ("seed: *a", "anchors"),
    "a merge key": ("optim: {<<: {lr: 5.0}}", "optim.<<"),
    "a root key twice": ("seed: 1\nseed: 2", "'seed' is given twice"),
    "a key twice": ("optim: {lr: 1, lr: 2}", "'lr' is given twice"),
    "a section twice": ("optim: {lr: 1}\noptim: {beta1: 0.5}", "'optim' is given twice"),
    "a dotted key twice": ("optim: {lr: 1}\noptim.lr: 2", "optim.lr is given twice"),
    "an epoch twice": ("augment: {size: {0: 28, 00: 32}}", "0 is given twice"),
    "a section that is a number": ("optim: 3", "optim is 3"),
    "a section that is text": ("optim: configs/cnn.yaml", "optim is 'configs"),
    "a section that is a list": ("optim: [1]", "optim is [1]"),
    "a section that is nothing": ("optim:", "optim is None"),
    "an option that is nothing": ("seed:", "seed is None; expected int"),
    "a section's option that is nothing": ("optim: {lr: }", "optim.lr is None; expected float"),
    "no such option": ("lr: 3", "did you mean optim.lr?"),
    "no such section": ("optims: {lr: 3}", "did you mean optim?"),
    "another section's option": ("optim: {every_steps: 3}", "did you mean "),
    "a section in a section": ("optim: {optim: {lr: 3}}", "optim.optim"),
    "another file": ("config: other.yaml", "option 'config' does not exist"),
    "print_config": ("print_config: true", "print_config"),
    "help": ("help: true", "help"),
    "a class": ("class_path: planted.Planted\ninit_args: {}", "class_path"),
    "a class for a section": ("optim: {class_path: planted.Planted}", "optim.class_path"),
    "our own class by name": (
        "optim: {class_path: fmnist.config.schema.OptimConfig, init_args: {lr: 1}}",
        "class_path",
    ),
    "a dunder": ("__class__: 3", "__class__"),
    "an empty key": ("'': 3", "option"),
    "a key with a space": ("optim: {'lr ': 3}", "did you mean optim.lr?"),
    "a key that is a list": ("? [1, 2]\n: 3", "a key"),
    "a key that is a truth": ("true: 3", "a key"),
    "another alphabet": ("s\u00e9ed: 3", "did you mean seed?"),
    "a picture as key": ("\U0001f600: 3", "\U0001f600"),
    "capitals": ("Seed: 3", "did you mean seed?"),
    "a list": ("[1, 2]", "expected options"),
    "a number": ("3", "expected options"),
    "text": ("words", "expected options"),
    "nothing": ("", "expected options"),
    "a comment": ("# nothing", "expected options"),
    "null": ("null", "expected options"),
    "two documents": ("seed: 3\n---\nseed: 4", "another document"),
    "open": ("optim: [", "line 1"),
    "one brace too many": ("optim: {lr: 0.1}}", "line 1"),
    "a tab": ("\tseed: 3", "line 1"),
    "bad indentation": ("seed: 1\n seed: 2", "line 2"),
    "a variable": ("data: {root: ${oc.env:HOME}}", "line 1"),
    "a null byte": ("seed: 3\0", "special characters"),
    "5,000 digits": ("seed: " + "9" * 5000, "limit"),
    "deep": ("model: {options: " + "{a: " * 3000, "nested deeper"),
    "deep lists": ("[" * 20_000, "nested deeper"),
    "too large": ("# " + "x" * (1 << 17), "longer than 65,536 characters"),
    "NaN in the model's options": ("model: {options: {a: [.nan]}}", "model.options"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_a_bad_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("planted.py").write_text("open('planted', 'w')\nclass Planted: pass\n")
    text, expected = BAD_YAML[kind]
    Path("bad.yaml").write_text(text)
    err = refused(capsys, "--config", "bad.yaml")
    assert expected in err, err
    assert not Path("planted").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize("kind", ["absent", "folder", "device", "fifo", "loop", "binary", "latin-1", "utf-16"])
def test_what_is_no_text_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind != "absent":
        content = {"binary": bytes(range(256)), "latin-1": b"seed: \xe9", "utf-16": "seed: 3".encode("utf-16")}
        path.write_bytes(content[kind])
    assert f"--config {path}: " in refused(capsys, "--config", str(path))
    assert f"--config {path}: " in refused(capsys, f"--config={path}", "--seed", "1")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config"], "--config"),
        (["--config", ""], "--config"),
        (["--config", "seed: 3"], "--config seed: 3: there is no such file"),
        (["--config", "absent.yaml", "--config", str(ROOT / "configs/cnn.yaml")], "absent.yaml"),
        (["--config", str(ROOT / "configs/cnn.yaml"), "--config", "absent.yaml"], "absent.yaml"),
        (["--print_config=everything"], "--print_config"),
        (["--print_config", "--optim.lrr", "3"], "did you mean optim.lr?"),
        (["--optim.lr", "-3", "--print_config"], "optim.lr"),
        (["--data", '{"root": 3}'], "data.root"),
        (["--data", '{"rooot": "x"}'], "did you mean data.root?"),
        (["--data", "3"], "data is 3"),
        (["--data", "configs/cnn.yaml"], "data is 'configs/cnn.yaml"),
        (["--data=[1]"], "data is [1]"),
        (["--data"], "data"),
        (["--optim", '{"lr": 3, "lr": 4}'], "'lr' is given twice"),
        (["--optim", "!!python/object/apply:os.system ['touch planted']"], "tag"),
        (["--optim", '{"class_path": "os.system"}'], "optim.class_path"),
        (["--optim.class_path", "os.system"], "optim.class_path"),
        (["--optim.init_args.lr", "3"], "optim.init_args.lr"),
        (["--class_path", "os.system"], "class_path"),
        (["--model.options", "!!python/name:os.system"], "model.options"),
        (["--optim.l", "3"], "did you mean optim.lr?"),
        (["--see", "3"], "did you mean seed?"),
        (["--optim.lr+", "3"], "did you mean optim.lr?"),
        (["--optim.lr"], "--optim.lr"),
        (["--optim.lr", "a\nb"], "optim.lr"),
        (["--dry_run", "maybe"], "dry_run"),
        (["--overwrite", "2"], "overwrite"),
        (["--lr", "3"], "did you mean optim.lr?"),
        (["-x"], "-x"),
        (["--"], "--"),
        (["--log.project", "a/b"], "log.project"),
        (["--output_dir", "/"], "output_dir"),
        (["--output_dir", "runs/" + "a" * 65], "output_dir"),
        (["--output_dir", "runs/caf\u00e9"], "output_dir"),
        (["--output_dir", "runs/a;b"], "output_dir"),
        (["--model.name", "\ud800"], "model.name"),
    ],
)
def test_a_bad_command_line(
    argv: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_sets_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("SEED", "TRAIN_SEED", "TRAIN_PY_SEED", "FMNIST_SEED"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("TRAIN_OPTIM__LR", "7")
    cfg = parse_config([], prog="train")
    assert cfg.seed == 0 and cfg.optim.lr < 1


def test_a_later_config_beats_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\noptim: {lr: 0.25, beta1: 0.5}")
    (tmp_path / "two.yaml").write_text("optim: {lr: 0.125}")
    cfg = parse_config(["--config", str(tmp_path / "one.yaml"), f"--config={tmp_path / 'two.yaml'}"])
    assert (cfg.seed, cfg.optim.lr, cfg.optim.beta1, cfg.output_dir) == (1, 0.125, 0.5, "runs/two")


def test_a_tilde_is_the_home_folder_and_no_folder_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    cfg = parse_config(["--output_dir=~/runs/x", "--model.weights=~/w.safetensors"], to_run=False)
    assert (cfg.output_dir, cfg.model.weights) == ("/home/anna/runs/x", "/home/anna/w.safetensors")
    with pytest.raises(ValueError, match="~/out would be a folder called ~: give the path that ~ stands for"):
        check_place(Path("~/out"))


def test_the_names_in_a_model_s_options_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text("class Planted: pass\n")
    cfg = parse_config(["--model.options", '{"class_path": "planted.Planted", "init_args": {}}'])
    assert cfg.model.options == {"class_path": "planted.Planted", "init_args": {}}
    assert "planted" not in sys.modules


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "optim: 3", "seeed: 3", "seed: -1", "[", LAUGHS, "a\0b"])
def test_a_damaged_config_of_a_run_is_one_line_and_no_output(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml does not hold a config of this version: ") as error:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


# A real process, watched: what it imports, opens for writing, connects to and starts.
WATCHED = """
import runpy, sys
def watch(event, args):
    if event == "open" and isinstance(args[0], str | bytes) and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        sys.__stdout__.write(f"{event} {args}\\n")
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.mkdir", "os.system", "os.rename"):
        sys.__stdout__.write(f"{event} {args}\\n")
sys.addaudithook(watch)
program, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(program, run_name="__main__")
finally:
    heavy = {"torch", "numpy", "timm", "accelerate", "wandb", "safetensors"} & set(sys.modules)
    sys.__stdout__.write("".join(f"imported {name}\\n" for name in sorted(heavy)))
"""


@pytest.mark.parametrize(
    ("argv", "text", "expected"),
    [
        (["--optim.lrr", "3"], None, "did you mean optim.lr?"),
        (["--optim.lr", ".nan"], None, "optim.lr is nan; valid range: 0 to 100"),
        (["--seed", "many"], None, "seed is 'many'; expected int"),
        (["--config", "absent.yaml"], None, "absent.yaml: there is no such file"),
        (["--config", "bad.yaml"], LAUGHS, "anchors"),
        (["--config", "bad.yaml"], "seed: !!python/object/apply:os.system ['touch planted']", "tag"),
        (["--config", "bad.yaml"], "optim: {lr: 1, lr: 2}", "'lr' is given twice"),
        (["--config", "bad.yaml"], "optim: 3", "optim is 3; expected options by name"),
    ],
)
def test_a_mistake_costs_no_import_no_network_and_no_disk(
    argv: list[str], text: str | None, expected: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    before = sorted(tmp_path.iterdir())
    start = time.monotonic()
    done = execute(sys.executable, "-B", "-c", WATCHED, ROOT / "train.py", *argv, cwd=tmp_path, timeout=60)
    assert time.monotonic() - start < 5
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


# ---- what is written reads back


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
awkward = st.sampled_from(
    ["off", "yes", "1e3", "0x1f", "1_0", "010", "2020-01-01", "12:30", ".5", "=", "~", "null", "<<"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5) | awkward, plain | awkward, max_size=4))
def test_yaml_reads_back_here_and_elsewhere(value: dict[str, Any]) -> None:
    text = strict_yaml.dump(value)
    assert strict_yaml.load(text) == value
    assert yaml.safe_load(text) == value


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,-&*!?|>'\"# \n\t01a.<", max_size=60))
def test_any_text_is_plain_values_or_one_kind_of_error(text: str) -> None:
    try:
        value = strict_yaml.load(text)
    except ValueError:
        return
    assert ast.literal_eval(repr(value).replace("nan", "0").replace("inf", "0")) is not NotImplemented


def test_a_resolved_config_with_awkward_names_reads_back(tmp_path: Path) -> None:
    for name in ("1e3", "off", "0x1f", "2020-01-01", "null"):
        cfg = replace(Config(), log=LogConfig(project=name), output_dir=f"runs/{name}")
        cfg = replace(cfg, model=ModelConfig(options={"a": [name, 1e-7]}))
        validate(cfg)
        (tmp_path / "config.yaml").write_text(to_yaml(cfg))
        assert load_config(tmp_path / "config.yaml") == cfg
