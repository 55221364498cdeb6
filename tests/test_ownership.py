"""Only what is ours is deleted or replaced: run directories, outputs of commands, evaluations on other data."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import command, untrained
from test_fingerprint import go, other_labels

import fmnist
from fmnist.apps.duplicates import main as duplicates_main
from fmnist.apps.export.__main__ import main as export_main
from fmnist.apps.search.__main__ import main as search_main
from fmnist.checkpoint.run_directory import open_directory
from fmnist.config.parse import load_config, parse_config
from fmnist.config.same_run import OF_A_START, run_yaml
from fmnist.config.schema import Config, ModelConfig, to_yaml
from fmnist.evaluation.options import parse_args
from fmnist.report.figures import save_figure
from fmnist.runtime.ownership import (
    EVALUATION,
    check_outputs,
    check_suffix,
    check_writable,
    delete_run_files,
    foreign_file,
    listing,
    remove_own,
    run_around,
)

OVER = {"resume": "never", "overwrite": True}


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run = tmp_path_factory.mktemp("template") / "run"
    go(run, data, profile=1, **OVER)
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every disk refuse a new folder."""

    def refuse(self: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "mkdir", refuse)


# --- overwrite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("checkpoints/llama.pt",),
        ("wandb/run-other/files/output.log",),
        ("evaluation/thesis.csv",),
        ("notes.txt",),
        ("config.yaml",),  # no config at all
        ("README.md", "train.py", ".git/config"),  # a repository
        ("summary.json", "model.safetensors"),
    ],
)
def test_a_directory_that_is_not_provably_a_run_is_never_overwritten(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = fill(tmp_path / "thesis", *names)
    with pytest.raises(
        ValueError, match=r"overwrite is true, but output_dir .*thesis is not a run .* holds \S+;"
    ) as error:
        open_directory(Config(output_dir=str(folder), resume="never", overwrite=True))
    assert any(part in str(error.value) for name in names for part in name.split("/"))
    assert "\n" not in str(error.value) and all((folder / name).read_text() == "mine" for name in names)


def test_a_recipe_by_hand_called_config_yaml_is_no_run_and_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("optim: {lr: 0.1}  # found by hand\n")
    for start in (OVER, {}):
        cfg = parse_config(["--config", str(tmp_path / "mine/config.yaml"), "--output_dir", str(tmp_path / "mine")])
        cfg = Config(**(vars(cfg) | start))
        with pytest.raises(ValueError, match="config.yaml was not written by a run"):
            open_directory(cfg)
    assert "found by hand" in (tmp_path / "mine/config.yaml").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoints/llama.pt", "checkpoints/step_1/model.safetensors", "checkpoints/step_00000002/notes.txt"),
        *("checkpoints/step_00000002/notes.json", "checkpoints/step_00000002/keep/model.safetensors"),
        *("features/llama.safetensors", "evaluation/thesis/report.txt", "checkpoints/.part_mine/thesis.tex"),
        *("evaluation/thesis.csv", "evaluation/metrics.json", "evaluation/test/notes.txt"),
        *("wandb/run-other/x", "features/notes", "profile/mine.json", "summary.json/x"),
    ],
)
def test_a_foreign_file_among_a_runs_own_is_named_and_nothing_goes(name: str, run: Path) -> None:
    if name.startswith("summary"):
        (run / "summary.json").unlink()
    fill(run, name)
    before = tree(run)
    with pytest.raises(ValueError, match=rf"overwrite is true, but .*{name} was not written by the run; nothing was"):
        open_directory(Config(output_dir=str(run), resume="never", overwrite=True))
    assert tree(run) == before


def test_all_that_a_run_and_its_commands_write_is_known_to_be_its_own(run: Path, data: Path) -> None:
    fill(run, *(f"evaluation/test/{name}" for name in EVALUATION))
    fill(run, "evaluation/step_00000004/val-0123abcd/report.txt", "evaluation/test/.report.txt.01234567.part")
    fill(run, "features/train_sample.safetensors", "features/step_00000004/val.safetensors", "REQUEUE")
    fill(run, *(f"checkpoints/{name}/manifest.json" for name in ("best_00000004", ".part_old_best_00000002")))
    fill(run, "wandb/offline-run-20261126_000000-abc123/files/x", "wandb/debug.log", "non_finite_step_00000003.png")
    (run / "wandb_run_id").write_text("abc123\n")
    (run / "wandb/latest-run").symlink_to("offline-run-20261126_000000-abc123")
    assert foreign_file(run) is None
    fill(run, "notes.txt", ".DS_Store", "checkpoints/.DS_Store", "export/model.onnx")
    open_directory(Config(output_dir=str(run), resume="never", overwrite=True))
    delete_run_files(run)
    assert tree(run) == [".DS_Store", ".lock", "export", "export/model.onnx", "notes.txt"]


def test_what_appears_among_its_files_meanwhile_is_left(run: Path) -> None:
    fill(run, "checkpoints/llama.pt", "evaluation/thesis.csv")
    delete_run_files(run)
    assert {"checkpoints/llama.pt", "evaluation/thesis.csv"} <= set(tree(run))
    assert not (run / "config.yaml").exists() and not list(run.glob("checkpoints/step_*"))


def test_a_kill_while_deleting_leaves_what_is_still_provably_ours(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = Path.unlink, [3]

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        delete_run_files(run)
    open_directory(Config(output_dir=str(run), resume="never", overwrite=True))


@pytest.mark.parametrize("name", ["checkpoints", "train.log", "evaluation", "config.yaml", ".lock", "evaluation/test"])
@pytest.mark.parametrize("start", [{}, OVER])
def test_a_link_that_leads_a_runs_files_elsewhere_is_refused(
    name: str, start: dict[str, object], run: Path, tmp_path: Path
) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    if (run / name).is_dir():
        shutil.move(run / name, tmp_path / "elsewhere")
    else:
        (run / name).unlink(missing_ok=True)
        (tmp_path / "elsewhere").write_text("mine")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"run/{name} is a link"):
        open_directory(Config(output_dir=str(run), **start))  # type: ignore[arg-type]
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "summary.json", "config.yaml"])
def test_a_pipe_under_a_runs_name_is_no_wait_without_end(name: str, run: Path) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    for start in ({}, OVER):
        with pytest.raises(ValueError, match=f"run/{name} is a pipe or a device"):
            open_directory(Config(output_dir=str(run), **start))  # type: ignore[arg-type]


def test_output_dir_itself_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    cfg = load_config(run / "config.yaml")
    assert open_directory(Config(**(vars(cfg) | {"output_dir": str(tmp_path / "link")}))) == tmp_path / "link"


def test_home_the_working_directory_and_a_place_in_a_run_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fill(tmp_path / "home", ".bashrc", "thesis.tex")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    for place in (".", str(home), "/"):
        with pytest.raises(ValueError, match="overwrite is true, but output_dir"):
            open_directory(Config(output_dir=place, resume="never", overwrite=True))
    for inside in ("checkpoints/new", "evaluation/new", "features"):
        with pytest.raises(ValueError, match="lies among the files of the run in"):
            open_directory(Config(output_dir=str(run / inside)))
    assert open_directory(Config(output_dir=str(run / "again"))) == run / "again"


def test_case_tells_names_apart(run: Path) -> None:
    fill(run, "Checkpoints/step_00000001/model.safetensors", "Summary.json")
    delete_run_files(run)
    assert {"Checkpoints/step_00000001/model.safetensors", "Summary.json"} <= set(tree(run))


# --- starting again --------------------------------------------------------------------------------------------------


def test_the_same_command_after_a_stop_goes_on_and_after_the_end_begins_again(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = run / "checkpoints/step_00000002/state.json"
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/step_{step:08d}")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "stopped", "steps": 2}))
    before = marker.stat().st_mtime_ns
    assert go(run, data, **OVER).summary["steps"] == 4
    assert marker.stat().st_mtime_ns == before  # it was resumed, not trained again
    assert "holds the unfinished run that this command began: it resumes" in capsys.readouterr().err

    # finished: SLURM starting the job again changes nothing; a person does
    before = (run / "summary.json").stat().st_mtime_ns
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    go(run, data, **OVER)
    assert "is finished" in capsys.readouterr().err
    assert (run / "summary.json").stat().st_mtime_ns == before
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    go(run, data, **OVER)
    assert (run / "summary.json").stat().st_mtime_ns > before


def test_other_options_or_other_data_are_another_command_and_begin_again(run: Path, data: Path, tmp_path: Path) -> None:
    (run / "summary.json").unlink()
    fingerprint = (run / "fingerprint.json").read_text()
    go(run, other_labels(data, tmp_path / "other"), **OVER)
    assert (run / "fingerprint.json").read_text() != fingerprint
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["prefix"] == "train" for line in lines) == 4  # from its first step
    (run / "summary.json").unlink()
    go(run, data, seed=3, **OVER)
    assert load_config(run / "config.yaml").seed == 3


def test_what_belongs_to_a_start_is_not_kept(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert not any(line.startswith(OF_A_START) for line in text.splitlines())
    cfg = parse_config(["--config", str(run / "config.yaml")], to_run=False)  # which is a copy
    assert (cfg.overwrite, cfg.resume, cfg.profile, cfg.dry_run, cfg.max_minutes) == (False, "auto", None, False, None)
    assert set(to_yaml(cfg).splitlines()) > set(text.splitlines())


# --- outputs of commands ---------------------------------------------------------------------------------------------


def test_a_file_that_a_command_did_not_make_stays_without_force(tmp_path: Path) -> None:
    table, picture = fill(tmp_path, "table.csv", "sheet.png") / "table.csv", tmp_path / "sheet.png"
    for path, mark in ((table, b"query,rank,"), (picture, b"")):
        with pytest.raises(ValueError, match=f"--output: {path} was not made by this command.*--force"):
            check_outputs({path: mark})
        check_outputs({path: mark}, force=True)
    table.write_text("query,rank,item\n")
    from matplotlib.figure import Figure

    save_figure(picture, Figure(figsize=(1, 1)))
    check_outputs({table: b"query,rank,", picture: b"", tmp_path / "new.csv": b"x"})
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ValueError, match="pipe.csv was not made"):
        check_outputs({tmp_path / "pipe.csv": b"query,rank,"})
    with pytest.raises(ValueError, match="is a folder"):
        check_outputs({tmp_path: b"x"}, force=True)


def test_an_index_of_many_names_is_known_wherever_the_library_puts_its_mark(tmp_path: Path) -> None:
    """safetensors writes what is said of a file in any order: beyond 64 KiB the mark stood within them by chance."""
    about = {"weights_sha256": "0" * 64, "names": json.dumps([f"pictures/number_{i:06d}.jpg" for i in range(10_000)])}
    for i in range(12):
        save_file({"features": torch.zeros(30_000)}, tmp_path / f"{i}.safetensors", metadata=about)
        check_outputs({tmp_path / f"{i}.safetensors": b""})
        remove_own(tmp_path / f"{i}.safetensors")
    save_file({"features": torch.zeros(30_000)}, tmp_path / "other.safetensors", metadata={"names": about["names"]})
    with pytest.raises(ValueError, match="was not made by this command"):
        check_outputs({tmp_path / "other.safetensors": b""})
    remove_own(tmp_path / "other.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 8)
    remove_own(tmp_path / "short.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "short.safetensors"]


def test_a_runs_files_are_replaced_by_no_output_and_not_by_force(run: Path) -> None:
    for name in ("model.safetensors", "config.yaml", "checkpoints/step_00000004/x.onnx", "features/train.safetensors"):
        with pytest.raises(ValueError, match="is a file of the run in"):
            check_outputs({run / name: b""}, force=True)
    check_outputs({fill(run, "export/model.onnx") / "export/model.onnx": b""})
    for place in ("search/hub", "mine", "evaluation"):
        with pytest.raises(ValueError, match="valid inside a run: .*export"):
            check_outputs({run / place / "config.yaml": b""}, force=True)
    check_outputs({run / "export/hub/config.yaml": b""})
    assert run_around(run / "evaluation/test/x") == run and run_around(run) is None


@pytest.mark.parametrize(
    ("path", "suffix", "message"),
    [
        ("model.safetensors", ".onnx", "ends in .onnx"),
        ("table.png", "", "valid: a folder"),
        ("x.csv", "", "valid: a folder"),
        ("model", ".onnx", "ends in .onnx"),
        ("there", "", "is a file; valid: a folder"),
    ],
)
def test_a_wrong_suffix_is_refused(path: str, suffix: str, message: str, tmp_path: Path) -> None:
    fill(tmp_path, "there")
    with pytest.raises(ValueError, match=message):
        check_suffix(tmp_path / path, suffix)
    for good, right in (("MODEL.ONNX", ".onnx"), ("v1.2", ""), ("photos", "")):
        check_suffix(tmp_path / good, right)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "file is not a folder"),
        ("file/run", "file/run cannot be made"),
        ("nothing", "nothing is a link to nothing"),
        ("nothing/run", "nothing is a link to nothing"),
    ],
)
def test_a_run_directory_that_cannot_be_is_one_line(path: str, message: str, tmp_path: Path) -> None:
    fill(tmp_path, "file")
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"output_dir: .*{message}"):
        open_directory(Config(output_dir=str(tmp_path / path)))
    assert not (tmp_path / "absent").exists()
    (tmp_path / "absent").mkdir()
    assert open_directory(Config(output_dir=str(tmp_path / "nothing"))) == tmp_path / "nothing"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177, 0o400, 0o777])
def test_a_umask_that_takes_files_from_their_owner_is_refused(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        if mask & 0o700:
            with pytest.raises(ValueError, match=f"umask is {mask:04o}"):
                check_writable(tmp_path / "a")
        else:
            check_writable(tmp_path / "a")
    finally:
        assert os.umask(before) == mask  # left as it was


def test_the_commands_refuse_before_they_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained(tmp_path / "run", ModelConfig(name="mlp", options={"width": 8}), 28)
    fill(model, "metrics.jsonl")
    fill(tmp_path, "out/search.csv", "out/report.txt", "pairs.csv", "m.onnx")
    monkeypatch.chdir(tmp_path)
    cases = (
        (export_main, ("run", "--to", "onnx", "--output", "run/model.safetensors"), "ends in .onnx"),
        (search_main, ("query", "run", "test:1", "--output", "table.png"), "valid: a folder"),
        (search_main, ("query", "run", "test:1", "--output", "out"), "out/search.csv was not made by this command"),
        (duplicates_main, ("--output", "pairs.csv"), "pairs.csv was not made by this command"),
        (duplicates_main, ("--output", "run/config.csv.yaml"), "ends in .csv"),
    )
    for main, args, expected in cases:
        assert expected in command(main, *args, status=2), args
    for args, expected in ((["--output", "out"], "out/report.txt was not made"), (["--output", "x.html"], "a folder")):
        monkeypatch.setattr("sys.argv", ["evaluate.py", "run", *args])
        assert expected in command(lambda _: parse_args() and 0, status=2)
    assert (tmp_path / "out/search.csv").read_text() == (tmp_path / "pairs.csv").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "a" / "b")
    assert tree(tmp_path) == []
    fill(tmp_path, "file")
    with pytest.raises(ValueError, match="file/b cannot be made: .*file is not a folder"):
        check_writable(tmp_path / "file" / "b")
    read_only(monkeypatch)
    with pytest.raises(ValueError, match="a/b cannot be written: read-only file system; --output names another place"):
        check_writable(tmp_path / "a" / "b")


def test_a_new_run_is_refused_early_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fill(tmp_path / "old", "notes.txt")
    (old / "config.yaml").write_text(run_yaml(Config(output_dir=str(old))))
    read_only(monkeypatch)
    new = Config(output_dir=str(tmp_path / "new"))
    said = "output_dir: .*new cannot be written: read-only file system; --output_dir names another place"
    with pytest.raises(ValueError, match=said):
        open_directory(new)
    assert open_directory(replace(new, dry_run=True)) == tmp_path / "new"  # which writes nothing
    assert open_directory(Config(output_dir=str(old))) == old  # a finished one is said to be finished


def test_a_folder_is_listed_or_said_to_be_none(tmp_path: Path) -> None:
    assert listing(tmp_path / "none") == []
    assert listing(fill(tmp_path, "b", "a", ".DS_Store", ".nfs0001", ".lock")) == ["a", "b"]
    with pytest.raises(ValueError, match="not a directory"):
        listing(tmp_path / "a")


# --- evaluation on other data ----------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_other_data_has_a_folder_and_a_heading_of_its_own_and_links_lead_nowhere(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    def evaluated(*args: object) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--quick", *map(str, args)])
        return command(lambda _: evaluate.main(), status=None, lines=None)

    evaluated()
    own = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert own["data"] == {"name": data.name, "sha256": fmnist.open_run(run).trained.images_sha256("test")}
    other = other_labels(data, tmp_path / "shop", "t10k")
    said = evaluated("--data.root", other)
    (folder,) = (path for path in (run / "evaluation").iterdir() if path.name != "test")
    found = json.loads((folder / "metrics.json").read_text())
    assert found["data"]["name"] == "shop" and folder.name == f"test-{found['data']['sha256'][:8]}"
    assert f"run: test images of shop (sha256 {found['data']['sha256'][:8]})" in said
    assert found["data"]["sha256"] in (folder / "report.txt").read_text()
    assert json.loads((run / "evaluation/test/metrics.json").read_text()) == own

    # the data replaced under the run's own root: still not its own
    shutil.copytree(data, tmp_path / "kept")
    shutil.copytree(other, data, dirs_exist_ok=True)
    shutil.rmtree(folder)
    evaluated()
    shutil.copytree(tmp_path / "kept", data, dirs_exist_ok=True)
    assert (folder / "metrics.json").is_file()

    shutil.rmtree(folder)
    folder.symlink_to(fill(tmp_path / "docs", "thesis.csv"))
    assert f"{folder} is a link out of the run directory" in evaluated("--data.root", other)
    assert tree(tmp_path / "docs") == ["thesis.csv"]
