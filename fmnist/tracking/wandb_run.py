"""The Weights & Biases run of a run directory; the only module that imports the client."""

import logging
import netrc
import os.path
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from fmnist.config.schema import LogConfig
from fmnist.runtime.console import one_line
from fmnist.runtime.environment import ENVIRONMENT, is_true, set_default, unset_empty
from fmnist.runtime.files import write_atomic
from fmnist.runtime.probe import answers

logger = logging.getLogger("fmnist")
RUN_ID = r"[A-Za-z0-9_-]{1,64}"
WANDB_ID_FILE = "wandb_run_id"
# Together below 10 s: the longest delay that an absent or broken server adds to a start.
PROBE_TIMEOUT_S, INIT_TIMEOUT_S = 2, 5
FINISH_TIMEOUT_S = 30  # data not sent by then stay on disk, for `wandb sync`
SETTINGS: dict[str, Any] = {
    "init_timeout": INIT_TIMEOUT_S,
    "login_timeout": INIT_TIMEOUT_S,
    "finish_timeout": FINISH_TIMEOUT_S,
    "silent": True,
    # Never sent, since they may hold a password or are nobody's concern: source, the remote's URL, argv, console
    # output, installed packages, the names of host and script.
    "x_save_requirements": False,
    "host": "-",
    "program": "fmnist",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "console": "off",
}


def start_wandb(directory: Path, cfg: LogConfig, resolved: Mapping[str, Any]) -> Any:
    """Start the W&B run of a run directory, or resume it if the directory holds its id.

    Args:
        directory: the run directory.
        cfg: its `wandb` is not disabled.
        resolved: every option of the run.

    Returns:
        The client's run; None where the environment or W&B's own settings disable it and `cfg` leaves that open. The
        client's exceptions pass through; the caller catches them.
    """
    set_default("WANDB_SILENT", "true")
    set_default("WANDB_ERROR_REPORTING", "false")
    home = os.path.expanduser("~")
    set_default("HOME", home if os.path.isdir(home) else tempfile.gettempdir())  # without one the client complains
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        unset_empty(name)
    import wandb  # late: takes half a second, and may not be installed

    user = wandb.setup().settings  # what the environment and W&B's files of settings say
    mode = _automatic_mode(user.mode) if cfg.wandb == "auto" else cfg.wandb
    if mode == "disabled":
        logger.info("Weights & Biases: disabled by its own settings; --log.wandb online overrides them")
        return None
    if mode == "online" and not answers(user.base_url, PROBE_TIMEOUT_S):
        logger.warning("Weights & Biases does not answer: offline")
        mode = "offline"
    run_id = _run_id(directory / WANDB_ID_FILE)
    options: dict[str, Any] = {
        "project": (user.project if cfg.project == LogConfig.project else None) or cfg.project,
        "name": user.run_name or directory.resolve().name,
        "id": run_id,
        "resume": "allow",
        "dir": str(directory),
        "config": dict(resolved),
    }
    settings = wandb.Settings(**SETTINGS)
    try:
        started = wandb.init(mode=mode, settings=settings, **options)
    except Exception as error:  # server absent, key refused: keep the numbers on disk instead
        if mode != "online":
            raise
        logger.warning("Weights & Biases cannot be used (%s): offline", without_secrets(error))
        wandb.teardown()  # else the client keeps the run id of the failed attempt
        mode, started = "offline", wandb.init(mode="offline", settings=settings, **options)
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    for name in ("top1", "macro_f1", "balanced_accuracy", "top5"):
        started.define_metric(f"val/{name}", step_metric="step", summary="max")
    started.define_metric("val/size", step_metric="step", summary="none")  # of the smaller images of a run that grows
    hint = "" if mode == "online" else f"; send it with: wandb sync {directory}/wandb/offline-run-*-{run_id}"
    asked_for = cfg.wandb != "auto" or has_api_key()  # else train.log alone says it
    logger.log(logging.INFO if asked_for else logging.DEBUG, "Weights & Biases: %s, run %s%s", mode, run_id, hint)
    return started


def finish_wandb(started: Any, *, failed: bool = False) -> None:
    """Finish a W&B run, and end the client's service where no other run of this process uses it.

    A service that is left may die meanwhile, in a notebook that trains again an hour later; it is not started anew.
    """
    import wandb

    started.finish(exit_code=int(failed))
    if wandb.run is None:
        wandb.teardown()


def log_evaluation(
    directory: Path,
    cfg: LogConfig,
    resolved: Mapping[str, Any],
    *,
    prefix: str,
    scalars: Mapping[str, float],
    files: Sequence[Path],
    errors: Sequence[Mapping[str, Any]],
) -> None:
    """Add an evaluation to the W&B run of a run directory, if it has one; a failure is one warning.

    Args:
        directory: the run directory.
        cfg: of the run.
        resolved: every option of the run.
        prefix: put before every name.
        scalars: go to the run's summary.
        files: pictures, each under its stem.
        errors: rows of one table, all with the same keys; `picture` is a uint8 array [H, W] or [H, W, 3].
    """
    if cfg.wandb == "disabled" or not (directory / WANDB_ID_FILE).is_file():
        return
    try:
        started = start_wandb(directory, cfg, resolved)
        if started is None:
            return
        import wandb

        columns: list[Any] = list(errors[0]) if errors else ["picture"]
        table = wandb.Table(columns=columns)
        for row in errors:
            table.add_data(*(wandb.Image(row[key]) if key == "picture" else row[key] for key in columns))
        pictures = {f"{prefix}/{file.stem}": wandb.Image(str(file)) for file in files}
        started.log({**pictures, f"{prefix}/errors": table})
        started.summary.update({f"{prefix}/{key}": value for key, value in scalars.items()})
        finish_wandb(started)
    except Exception as error:  # the files are written; whatever a tracker raises must not end an evaluation
        logger.warning("Weights & Biases has no evaluation: %s", without_secrets(error))


def _automatic_mode(asked: str) -> Literal["online", "offline", "disabled"]:
    """Return what `auto` means where the client's own settings ask for this mode."""
    if asked == "disabled" or is_true("WANDB_DISABLED"):
        return "disabled"
    return "online" if asked not in ("offline", "dryrun") and has_api_key() else "offline"


def _run_id(path: Path) -> str:
    """Return the W&B run id, which the first start chose and wrote to `path`."""
    try:
        run_id = path.read_text().strip()
    except (OSError, ValueError):
        run_id = ""
    if not re.fullmatch(RUN_ID, run_id):
        run_id = ENVIRONMENT.get("WANDB_RUN_ID", "")  # chosen by a sweep's agent
        if not re.fullmatch(RUN_ID, run_id):
            run_id = secrets.token_hex(4)
        write_atomic(path, run_id + "\n")
    return run_id


def without_secrets(error: Exception) -> str:
    """Return an error on one line of at most 200 characters, without the API key and passwords in URLs."""
    text = re.sub(r"//[^/@\s]+@", "//***@", str(error))
    key = ENVIRONMENT.get("WANDB_API_KEY")
    return one_line(text.replace(key, "***") if key else text, 200)  # cut last: half a key is a secret too


def has_api_key() -> bool:
    """Return whether the client would find an API key: in the environment or in netrc."""
    if ENVIRONMENT.get("WANDB_API_KEY") or ENVIRONMENT.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own_server = urlsplit(ENVIRONMENT.get("WANDB_BASE_URL", "")).hostname
    try:
        hosts = netrc.netrc(ENVIRONMENT.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any("wandb" in host or host == own_server for host in hosts)
