"""Options: what is legal, what is refused and how, and that a config survives its own YAML."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fmnist.config.parse import load_config, parse_config
from fmnist.config.same_run import differences
from fmnist.config.schema import Config, flatten, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_config(list(argv), prog="train.py")
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("train.py: error: ")
    return err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optim.lrr", "3"], "did you mean optim.lr?"),
        (["--modell.name", "cnn"], "did you mean model.name?"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--batch.global_batch_size", "0"], "batch.global_batch_size is 0; legal: 1 to 60000"),
        (["--batch.global_batch_size", "1.5"], "batch.global_batch_size"),
        (["--augment.flip", "1.01"], "augment.flip is 1.01; legal: 0 to 1"),
        (["--augment.size", "4"], "augment.size is 4; legal: 8 to 1024"),
        (["--augment.size", '{"1": 32}'], "augment.size"),
        (["--augment.mix_probability", "0.5"], "has no effect"),
        (["--optim.name", "adamm"], "optim.name"),
        (["--config", "no_such_file.yaml"], "no_such_file.yaml"),
        (["--overwrite", "true"], "give --resume never"),
        (["--output_dir", "runs/a b"], "output_dir"),
        (["--seed", "-1"], "seed is -1; legal: 0 to"),
        (["--log.wandb", "maybe"], "log.wandb"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refuse(capsys, *argv)


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
    assert expected in refuse(capsys, "--config", "bad.yaml")
    assert not Path("planted").exists()


def test_a_huge_yaml_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "huge.yaml"
    path.write_text("#" * (2 << 20))
    assert "larger than" in refuse(capsys, "--config", str(path))


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 0.5, weight_decay: 0.25}\n")
    cfg = parse_config(["--config", str(path), "--optim.lr", "0.125", "--augment.size", '{"0": 96, "4": 128}'])
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.beta1) == (0.125, 0.25, 0.9)
    assert cfg.augment.size == {0: 96, 4: 128}
    assert cfg.output_dir == "runs/mine"


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


def test_what_changes_the_result_is_named_and_what_does_not_is_free() -> None:
    old = Config()
    assert differences(old, replace(old, seed=1)) == ["seed was 0, now 1"]
    free = replace(old, max_minutes=1.0, output_dir="elsewhere", batch=replace(old.batch, micro_batch_size=8))
    assert differences(old, free) == []


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in flatten(Config()):
        assert f"--{name} " in shown
    # Its own docstring stands behind each; three of them, from three sections.
    for text in ("Probability of a horizontal flip.", "Passes over the training images.", "Newest checkpoints kept"):
        assert text in shown
