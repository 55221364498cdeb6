"""Numbers out: metrics.jsonl always, a progress bar on a terminal, Weights & Biases. None of them can stop a run."""

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmnist.config import LogConfig

logger = logging.getLogger("fmnist")
METRICS_FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_run_id"
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 10, 60
PERF_KEYS = ("images_per_second", "step_time_s")


def metric_name(prefix: str, key: str) -> str:
    """Return the name a scalar has everywhere outside metrics.jsonl, e.g. train/loss or perf/step_time_s."""
    return f"perf/{key}" if key in PERF_KEYS else f"{prefix}/{key}"


class NullTracker:
    """What every process but the main one logs to."""

    def log(self, prefix: str, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


class Tracker(NullTracker):
    """Write the main process's numbers.

    Args:
        directory: the run directory.
        cfg: where the numbers go.
        resolved: every option of the run, for Weights & Biases.
        step: completed steps of the checkpoint the run continues from; lines after it are dropped from metrics.jsonl.
        total_steps: the length of the progress bar.
    """

    def __init__(
        self, directory: Path, cfg: LogConfig, resolved: Mapping[str, Any], *, step: int, total_steps: int
    ) -> None:
        self.path = directory / METRICS_FILE
        truncate_metrics(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(initial=step, total=total_steps, unit="step", dynamic_ncols=True, smoothing=0.1)
        self.wandb: Any = None
        if cfg.wandb != "disabled":
            self._try_wandb(lambda: self._start_wandb(directory, cfg, resolved))

    def log(self, prefix: str, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Write one line of scalars.

        Args:
            prefix: train, val or test.
            scalars: names without the prefix.
            step: completed optimizer updates, the x axis.
            epoch: passes over the training images, with the fraction.
        """
        # JSON has no NaN: a broken value is written as null and said by name elsewhere.
        clean = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._write(json.dumps({"step": step, "epoch": round(epoch, 4), "prefix": prefix} | clean))
        text = "  ".join(f"{metric_name(prefix, k)} {v:.5g}" for k, v in scalars.items())
        logging.getLogger("fmnist.metrics").info("step %d  epoch %.2f  %s", step, epoch, text)
        if self.bar is not None:
            self.bar.n = step
            shown = {k: f"{v:.4g}" for k, v in scalars.items() if k in ("images_per_second", "loss", "lr", "top1")}
            self.bar.set_postfix(shown, refresh=True)
        named = {metric_name(prefix, k): v for k, v in scalars.items()}
        self._try_wandb(lambda: self.wandb and self.wandb.log(named | {"step": step, "epoch": epoch}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close everything; the summary goes to Weights & Biases too."""
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        self._try_wandb(lambda: self._finish_wandb(summary))

    def _write(self, line: str) -> None:
        try:
            self.file.write(line + "\n")
            self.file.flush()
        except OSError as error:  # a full disk must not end the training that may yet save elsewhere
            logger.warning("%s cannot be written: %s", self.path, error)

    def _try_wandb(self, call: Callable[[], Any]) -> None:
        """Call Weights & Biases; at its first failure say so once and go on without it."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            logger.warning("Weights & Biases is off from here: %s", " ".join(str(error).split())[:200])
            self.wandb = None

    def _start_wandb(self, directory: Path, cfg: LogConfig, resolved: Mapping[str, Any]) -> None:
        self.wandb = start_wandb(directory, cfg, resolved)

    def _finish_wandb(self, summary: Mapping[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            self.wandb.finish()


def start_wandb(directory: Path, cfg: LogConfig, resolved: Mapping[str, Any]) -> Any:
    """Open the run directory's run of Weights & Biases: a new one, or the one whose id is kept there.

    Args:
        directory: the run directory.
        cfg: its `wandb` is not disabled.
        resolved: every option of the run.

    Returns:
        The client's run; whatever it raises is the caller's to catch.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # half a second, and absent on some machines: only where it is used

    mode = cfg.wandb
    if mode == "auto":
        mode = "online" if has_api_key() else "offline"
    id_file = directory / WANDB_ID_FILE
    run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
    id_file.write_text(run_id + "\n")
    options: dict[str, Any] = {
        "project": cfg.project,
        "name": directory.resolve().name,
        "id": run_id,
        "resume": "allow",
        "dir": str(directory),
        "config": dict(resolved),
    }
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S, login_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, silent=True
    )
    try:
        started = wandb.init(mode=mode, settings=settings, **options)
    except Exception as error:  # noqa: BLE001 - server away, key refused: the numbers are kept on disk instead
        if mode != "online":
            raise
        logger.warning("Weights & Biases is unreachable (%s): offline", " ".join(str(error).split())[:120])
        mode, started = "offline", wandb.init(mode="offline", settings=settings, **options)
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    started.define_metric("val/top1", step_metric="step", summary="max")
    hint = "" if mode == "online" else f"; send it with: wandb sync {directory}/wandb/offline-run-*-{run_id}"
    logger.info("Weights & Biases: %s, run %s%s", mode, run_id, hint)
    return started


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
    """Add an evaluation to the W&B run of a run directory, where it has one; whatever fails is one warning.

    Args:
        directory: the run directory.
        cfg: of the run.
        resolved: every option of the run.
        prefix: before every name.
        scalars: go to the run's summary.
        files: pictures, each under its stem.
        errors: rows of one table, all with the same keys; `picture` is a uint8 array [H, W].
    """
    if cfg.wandb == "disabled" or not (directory / WANDB_ID_FILE).is_file():
        return
    try:
        started = start_wandb(directory, cfg, resolved)
        import wandb

        columns: list[Any] = list(errors[0]) if errors else ["picture"]
        table = wandb.Table(columns=columns)
        for row in errors:
            table.add_data(*(wandb.Image(row[key]) if key == "picture" else row[key] for key in columns))
        pictures = {f"{prefix}/{file.stem}": wandb.Image(str(file)) for file in files}
        started.log({**pictures, f"{prefix}/errors": table})
        started.summary.update({f"{prefix}/{key}": value for key, value in scalars.items()})
        started.finish()
    except Exception as error:  # noqa: BLE001 - the files are written; whatever a tracker raises, evaluation goes on
        logger.warning("Weights & Biases has no evaluation: %s", " ".join(str(error).split())[:200])


def has_api_key() -> bool:
    """Say whether Weights & Biases would find a key: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        import netrc

        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, SyntaxError):
        return False


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the run writes again, and a line cut short by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step and entry.get("prefix") != "test":  # the test images are evaluated again
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
