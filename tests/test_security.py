"""What must never happen: a secret in what a run writes or sends, code that a file brings along, a shell."""

import ast
import gzip
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RUN, train
from test_tracker_faults import Server

from fmnist.config import strict_yaml

# Long enough that none appears by chance; the key has the length that the client asks for.
SECRETS = {
    "WANDB_API_KEY": "5ec2e7a11" + "0" * 22 + "deadbeef7",
    "HF_TOKEN": "hf_planted5ec2e7TokenOfTheHub0",
    "netrc": "planted5ec2e7PasswordOfNetrc",
    "HTTPS_PROXY": "planted5ec2e7PasswordOfProxy",
    "AWS_SECRET_ACCESS_KEY": "planted5ec2e7/AwsKey+0123456789abcdefghi",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plant the five where users keep them; return a config."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine git.example.org login me password {SECRETS['netrc']}\n")
    (home / ".netrc").chmod(stat.S_IRUSR)
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRETS[name])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED0000000000")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRETS['HTTPS_PROXY']}@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    return tmp_path / "small.yaml"


def assert_no_secret(where: object, data: bytes) -> None:
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    for name, secret in SECRETS.items():
        assert secret.encode() not in data, f"{name} is in {where}"


def assert_clean(run: Path, output: str, home: Path) -> None:
    files = [path for folder in (run, home) for path in folder.rglob("*") if path.is_file() and path.name != ".netrc"]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert_no_secret(path, path.read_bytes())
    assert_no_secret("the messages", output.encode())


@pytest.mark.thorough
def test_an_offline_run_holds_no_secret(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A server that is away, with a password in its address: its error message is a way out, too.
    monkeypatch.setenv("WANDB_BASE_URL", f"http://me:{SECRETS['HTTPS_PROXY']}@127.0.0.1:9")
    done = train("--config", planted, "--output_dir", tmp_path / "run", "--log.wandb", "auto")
    assert "offline" in done.stderr
    assert_clean(tmp_path / "run", done.stdout + done.stderr, tmp_path / "home")


@pytest.mark.thorough
def test_an_online_run_neither_writes_nor_sends_a_secret(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server("works")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        done = train("--config", planted, "--output_dir", tmp_path / "run", "--log.wandb", "auto")
    finally:
        server.stop()
    assert "online, run" in done.stderr
    assert_clean(tmp_path / "run", done.stdout + done.stderr, tmp_path / "home")
    assert any(b"train/loss" in body for body in server.bodies), "the numbers were sent"
    for path, body in zip(server.paths, server.bodies, strict=True):
        assert_no_secret(path, body)
        for word in (b"netrc", b"AKIAPLANTED"):
            assert word not in body, path


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the project's own code, with the dotted name of what is called."""
    # __main__.py imports by name, from its table of commands.
    files = [path for path in (ROOT / "fmnist").rglob("*.py") if path != ROOT / "fmnist" / "__main__.py"]
    for path in [*files, ROOT / "train.py", ROOT / "evaluate.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def test_nothing_unpickles_evaluates_imports_by_name_or_starts_a_shell() -> None:
    names = []
    for name, node in calls():
        names.append(name)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert name not in ("eval", "exec", "compile", "__import__"), ast.unparse(node)
        assert name.rpartition(".")[2] not in ("import_module", "system", "popen", "getoutput"), ast.unparse(node)
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), ast.unparse(node)
        assert keywords.get("shell", "False") == "False", ast.unparse(node)
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", ast.unparse(node)
        assert not name.startswith("yaml.load"), ast.unparse(node)  # strict_yaml.py reads events: no tag is constructed
        if name == "yaml.parse":
            assert keywords.get("Loader") == "yaml.BaseLoader", ast.unparse(node)
        assert not name.startswith("yaml.") or "unsafe" not in name and "full" not in name
    assert "torch.load" in names and "yaml.parse" in names, "the walk sees what it is to judge"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!!str a", "!own a"])
def test_a_config_constructs_nothing_from_a_tag(tag: str) -> None:
    with pytest.raises(ValueError, match="line 1: tag .* is not accepted"):
        strict_yaml.load(f"seed: {tag}")
