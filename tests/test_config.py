"""Options: valid values, refusals in one line, help, and a config that survives its own YAML."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small import refused

from fmnist.config.parse import load_config, parse_config, update
from fmnist.config.same_run import changes, differences, listed, run_yaml
from fmnist.config.schema import OPTIONS, Config, flatten, meanings, to_yaml, unflatten
from fmnist.models import REGISTRY
from fmnist.optim import Schedule

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optim.lrr", "3"], "did you mean optim.lr?"),
        (["--modell.name", "cnn"], "did you mean model.name?"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--batch.global_batch_size", "0"], "batch.global_batch_size is 0; valid range: 1 to 1000000"),
        (["--batch.global_batch_size", "1.5"], "batch.global_batch_size"),
        (["--augment.flip", "1.01"], "augment.flip is 1.01; valid range: 0 to 1"),
        (["--augment.size", "4"], "augment.size is 4; valid range: 8 to 1024"),
        (["--augment.size", '{"1": 32}'], "augment.size"),
        (["--augment.mix_probability", "0.5"], "has no effect"),
        (["--augment.flip_in_turn", "--augment.flip", "0"], "augment.flip_in_turn has no effect"),
        (["--optim.name", "adamm"], "optim.name"),
        (["--config", "no_such_file.yaml"], "no_such_file.yaml"),
        (["--overwrite", "true"], "give --resume never"),
        (["--output_dir", "runs/a b"], "output_dir"),
        (["--seed", "-1"], "seed is -1; valid range: 0 to 2147483647"),
        (["--log.wandb", "maybe"], "log.wandb"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 3}", "did you mean optim.lr?"),
        ("optims: {lr: 3}", "optims"),
        ("optim: [", "config"),
        ("seed: !!python/object/apply:os.system ['touch planted']", "python/object/apply"),
        ("a\x00b", "config"),
        ("[1, 2]", ""),
    ],
)
def test_a_bad_yaml_file_is_one_line(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    assert expected in refused(capsys, "--config", "bad.yaml")
    assert not Path("planted").exists()


def test_a_huge_yaml_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "huge.yaml"
    path.write_text("#" * (2 << 20))
    assert "longer than" in refused(capsys, "--config", str(path))


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 0.5, weight_decay: 0.25}\n")
    cfg = parse_config(["--config", str(path), "--optim.lr", "0.125", "--augment.size", '{"0": 96, "4": 128}'])
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.beta1) == (0.125, 0.25, 0.9)
    assert cfg.augment.size == {0: 96, 4: 128}
    assert cfg.output_dir == "runs/mine"


def test_the_options_of_a_recipes_model_go_with_its_model(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {name: cnn, options: {widths: [8, 16]}}")
    second.write_text("model: {name: mlp}")

    def options(*argv: str) -> dict[str, Any]:
        return parse_config(["--config", str(first), *argv]).model.options

    assert options() == options("--model.name", "cnn") == {"widths": [8, 16]}
    assert options("--model.name", "resnet18") == options("--config", str(second)) == {}
    both = ["--model.options", "{width: 64}", "--model.name", "mlp"]  # in either order
    assert options(*both) == options(*both[2:], *both[:2]) == {"width": 64}
    assert options("--config", str(second), "--model.name", "cnn") == {}
    mine = flatten(parse_config(["--config", str(first)]))  # as fmnist.train takes a Config
    assert update(mine, {"model.name": "mlp"})["model.options"] == {} != mine["model.options"]
    assert update(mine, {"model.name": "cnn", "seed": 3})["model.options"] == mine["model.options"]
    assert options("--model", "{name: mlp, options: {width: 8}}") == {"width": 8}


def test_a_bare_dry_run_means_true() -> None:
    assert parse_config(["--dry_run"]).dry_run
    assert parse_config(["--dry_run", "--seed", "3"]).seed == 3
    assert not parse_config(["--dry_run", "false"]).dry_run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_reads_and_says_how_it_was_run(path: Path) -> None:
    cfg = parse_config(["--config", str(path)])
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"configs/{path.name}" in header  # the command
    assert cfg.output_dir == f"runs/{path.stem}"
    # The accuracy seen, or the plain words that it was not.
    assert re.search(r"\d\d\.\d+ %|not measured", header)


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    cfg = parse_config(
        ["--augment.size", '{"0": 96, "4": 128}', "--model.options", '{"widths": [8, 16]}', "--seed", "7"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path / "config.yaml") == cfg


def test_an_option_that_changes_the_result_is_named_and_any_other_is_free() -> None:
    old = Config()
    assert differences(old, replace(old, seed=1)) == ["seed was 0, now 1"]
    free = replace(old, max_minutes=1.0, output_dir="elsewhere", batch=replace(old.batch, micro_batch_size=8))
    assert differences(old, free) == []


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_config([*argv, "--help"], prog="train.py")
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith("usage: train.py [--config FILE ...] [--SECTION.FIELD VALUE ...]")
    assert usage.count("\n") == 1
    assert rest.count("accelerate launch train.py") == 2  # the examples
    shown = " ".join(text.split())
    for name in OPTIONS:
        assert f"--{name} " in shown
        assert meanings()[name] in shown
    # Its type, docstring, valid range and default (of configs/cnn.yaml) stand behind each.
    for words in (
        "--augment.flip float Probability of a horizontal flip. Valid range: 0 to 1. (default: 0.1)",
        "null disables it. Valid range: 0.01 to 1. (default: null)",
        "--augment.size int|{int: int} Image size in pixels per side",
        "--resume auto|never auto: resume from the newest valid checkpoint; never: refuse a non-empty directory.",
        "--data.holdout float Share of each class held out for validation, and as much for the test, of a folder "
        "without such splits. Valid range: 0.001 to 0.45. (default: 0.1)",
        "mlp, cnn, hybrid, wide_resnet, or any timm classifier",
        *(path.stem for path in CONFIGS),
    ):
        assert words in shown


def test_help_shows_the_defaults_of_the_recipe_that_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = "never rescaled. Valid range: 0 to 100. (default: {})"
    shown = " ".join(help_of(capsys).split())
    assert lr.format(0.02) in shown and '(default: {"0": 20, "4": 28})' in shown
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.25}\nmodel: {name: mlp}")
    shown = " ".join(help_of(capsys, "--config", str(tmp_path / "mine.yaml"), "--optim.lr", "3").split())
    assert lr.format(0.25) in shown and "(default: mlp)" in shown
    assert f"those of {tmp_path / 'mine.yaml'}." in shown
    assert "no_such_file.yaml: there is no such file" in refused(capsys, "--config", "no_such_file.yaml", "--help")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule.steps": 4, "schedule.warmup_steps": 5}, "schedule.warmup_steps is 5, but the run has 4 steps"),
        ({"schedule.epochs": 1.0, "schedule.warmup_steps": 10}, "warmup_steps is 10, but the run has 10 steps"),
        ({"schedule.epochs": 2.0, "optim.head_only_epochs": 2.5},
         "optim.head_only_epochs is 2.5, 25 steps, but the run has 20; valid range: 0 to 2"),
    ],
)  # fmt: skip
def test_a_phase_longer_than_the_run_is_refused_with_the_flag_that_helps(
    options: dict[str, float], expected: str
) -> None:
    cfg = unflatten(flatten(Config()) | {"schedule.warmup_epochs": 1.0} | options)
    with pytest.raises(ValueError) as caught:
        Schedule.from_config(cfg, steps_per_epoch=10)
    assert expected in str(caught.value)


def test_the_head_alone_may_be_trained_for_the_whole_run() -> None:
    cfg = unflatten(flatten(Config()) | {"schedule.epochs": 2.0, "optim.head_only_epochs": 2.0})
    assert Schedule.from_config(cfg, steps_per_epoch=10).head_only_steps == 20


@pytest.mark.parametrize("name", OPTIONS)
def test_every_number_has_a_valid_range_that_holds_its_default(name: str) -> None:
    kind, limits = str(OPTIONS[name].type), OPTIONS[name].metadata.get("valid")
    assert (limits is not None) == ("int" in kind or "float" in kind)
    if limits and isinstance(default := flatten(Config())[name], int | float):
        assert limits[0] <= default <= limits[1]


@pytest.mark.parametrize(
    ("argv", "option", "value"),
    [
        (["--optim.lr=1e-3"], "optim.lr", 0.001),
        (["--optim.lr", ".5"], "optim.lr", 0.5),
        (["--optim.lr", "1"], "optim.lr", 1.0),
        (["--optim.lr", "1", "--optim.lr", "2"], "optim.lr", 2.0),
        (["--optim", "{lr: 1, beta1: 0.5}", "--optim.lr", "2"], "optim.lr", 2.0),
        (["--optim.lr", "2", "--optim={lr: 1}"], "optim.lr", 1.0),
        (["--optim.layer_decay", "null"], "optim.layer_decay", None),
        (["--augment.size", "32"], "augment.size", 32),
        (["--augment.size", '{"0": 16, "4": 28}'], "augment.size", {0: 16, 4: 28}),
        (["--augment", "{size: {0: 16, 4: 28}}"], "augment.size", {0: 16, 4: 28}),
        (["--model.compile"], "model.compile", True),
        (["--resume", "never", "--overwrite"], "overwrite", True),
        (["--model.pretrained", "True"], "model.pretrained", True),
        (["--log.project", "1e3"], "log.project", "1e3"),
        (["--output_dir", "runs/2026-01-01"], "output_dir", "runs/2026-01-01"),
        (["--output_dir", "null"], "output_dir", "runs/cnn"),
        (["--model.options", "{widths: [8, 16], eps: 1e-6, act: off}"], "model.options",
         {"widths": [8, 16], "eps": 1e-6, "act": "off"}),
    ],
)  # fmt: skip
def test_a_flag_sets_its_option_to_a_value_of_its_type(argv: list[str], option: str, value: object) -> None:
    found = flatten(parse_config(argv))[option]
    assert (found, type(found)) == (value, type(value))


def test_print_config_prints_what_reads_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--augment.size", '{"0": 16, "4": 28}', "--log.project", "1e3"]
    with pytest.raises(SystemExit) as caught:
        parse_config([*argv, "--print_config"])
    assert caught.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_config(["--config", str(tmp_path / "printed.yaml")]) == parse_config(argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optim.name", "sgd", "--optim.beta2", "0.9"], "optim.beta2 0.9 has no effect: optim.name is sgd"),
        (["--schedule.name", "constant", "--schedule.min_lr", "0.001"], "schedule.min_lr 0.001 has no effect"),
        (["--exact", "3"], "exact is 3; valid: a divisor of batch.global_batch_size 256"),
        (["--exact", "4", "--batch.micro_batch_size", "16"], "exact makes it 256 / 4 = 64: leave it out"),
        (["--augment.size", "{0: 16, -1: 28}"], "augment.size is {0: 16, -1: 28}; valid: {0: pixels, "),
        (["--augment.size", '{"0": 16, 0: 28}'], "augment.size is "),
        (["--optim.lr", "9" * 400], "optim.lr is 99999"),
        (["--optim.lr", "1e999"], "optim.lr is inf; valid range: 0 to 100"),
        (["--optim.layer_decay", ""], "optim.layer_decay is ''; expected float|null"),
        (["--data.root", ""], "data.root is ''; valid: 1 to 4096 printable characters"),
        (["--model.name", "null"], "model.name is None; expected text"),
        (["--tta", "flip"], "did you mean evaluation.tta?"),
        (["--learning_rate", "0.1"], "did you mean optim.lr?"),
        (["--optim.learning-rate", "0.1"], "did you mean optim.lr?"),
        (["--batch_size", "64"], "did you mean batch.global_batch_size?"),
        (["--batch.size", "64"], "did you mean batch.global_batch_size?"),
        (["--epochs", "3"], "did you mean schedule.epochs?"),
        (["--optim.epochs", "3"], "did you mean schedule.epochs?"),
        (["--log.every_step", "3"], "did you mean log.every_steps?"),
        (["--model", "mlp"], "expected options by name, e.g. optim: {lr: 0.001} (did you mean model.name?)"),
        (["--config", "mlp"], "--config mlp: there is no such file (did you mean configs/mlp.yaml?)"),
        (["--config", "config/mlp.yml"], "there is no such file (did you mean configs/mlp.yaml?)"),
        (["--config", "configs/mlpp.yaml"], "--config configs/mlpp.yaml: there is no such file\n"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_or_misread_is_refused(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.name", "convnext_tinny"], "model.name: unknown model 'convnext_tinny'; nearest: convnext_tiny"),
        (["--model.name", "resnet18", "--model.weights", "no.pt"], "model.weights: there is no file no.pt\n"),
        (
            ["--config", "configs/efficientnet_lite0.yaml", "--model.weights", "no.safetensors"],
            "there is no file no.safetensors; leave it out and timm fetches the weights of model.pretrained",
        ),
        (["--model.name", "resnet18", "--model.weights", __file__], "is none of .safetensors, .pt, .pth"),
        (["--data.root", "/nonexistent"], "data.root: no Fashion-MNIST in /nonexistent: found no such folder"),
        (["--data.root", __file__], ": found a file"),
        (["configs/mlp.yaml"], "'configs/mlp.yaml' is no option (did you mean --config configs/mlp.yaml?)"),
    ],
)
def test_what_is_not_there_is_said_before_torch_is_imported(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said in refused(capsys, *flags, "--output_dir", str(tmp_path / "run"))


def test_a_begun_run_and_any_name_of_timm_pass_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("resnet18", "resnet18.a1_in1k", "vit_tiny_patch16_224", *REGISTRY):
        assert parse_config(["--model.name", name]).model.name == name
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    assert parse_config(["--data.root", "~/images"]).data.root == "~/images"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    gone = ["--output_dir", str(tmp_path / "run"), "--data.root", "/nonexistent"]
    assert parse_config(gone).data.root == "/nonexistent"  # the run may be finished


def test_the_config_of_a_copied_or_moved_run_does_not_act_on_the_old_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = run_yaml(Config(output_dir="runs/first"))
    for name in ("runs/first", "runs/copy"):
        Path(name).mkdir(parents=True)
        Path(name, "config.yaml").write_text(text)
    copy = ["--config", "runs/copy/config.yaml"]
    said = refused(capsys, *copy, "--schedule.steps", "20")
    assert "--config runs/copy/config.yaml is of a run whose output_dir is runs/first, but lies in runs/copy" in said
    assert "Give --output_dir runs/copy to use the run here, or --output_dir runs/first to use that one" in said
    for place in ("runs/copy", "runs/first", "runs/third"):  # what is asked for by name is done
        assert parse_config([*copy, "--output_dir", place]).output_dir == place
    assert parse_config(["--config", "runs/first/config.yaml"]).output_dir == "runs/first"
    assert parse_config(["--config", str(tmp_path / "runs/first/config.yaml")]).output_dir == "runs/first"
    assert parse_config(copy, to_run=False).output_dir == "runs/first"  # fmnist data looks at its data only
    Path("runs/copy").rename("runs/moved")
    assert "but lies in runs/moved" in refused(capsys, "--config", "runs/moved/config.yaml", "--dry_run")
    Path("other.yaml").write_text("{output_dir: runs/other}")
    later = parse_config(["--config", "runs/moved/config.yaml", "--config", "other.yaml"])
    assert later.output_dir == "runs/other"
    Path("config.yaml").write_text(to_yaml(Config(output_dir="runs/first")))  # printed: a recipe, and no run's own
    assert parse_config(["--config", "config.yaml"]).output_dir == "runs/first"


def test_another_model_is_named_first_and_what_is_left_out_is_counted() -> None:
    changed = ["data.limit was null, now 9", "batch.global_batch_size was 8, now 9", "augment.flip was 0, now 1"]
    assert listed(changed) == "; ".join(changed) and listed(changed[:1]) == changed[0]
    changed += ["model.name was cnn, now mlp", "seed was 0, now 1"]
    assert listed(changed) == f"{changed[3]}; {changed[0]}; {changed[1]} and 2 more"  # 5 - 3
    old = Config()
    other = replace(old, seed=1, data=replace(old.data, name="mnist", limit=9), model=replace(old.model, name="mlp"))
    said = listed(differences(old, other))
    assert (
        said
        == "data.name was fashion_mnist, now mnist; model.name was cnn, now mlp; data.limit was null, now 9 and 1 more"
    )


def test_a_difference_is_said_in_the_words_of_yaml() -> None:
    assert changes({"a": 60, "b": True, "c": "x"}, {"a": None, "b": False, "c": "y"}) == [
        "a was 60, now null",
        "b was true, now false",
        "c was x, now y",
    ]
