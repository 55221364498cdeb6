"""Numbers out: metrics.jsonl always, a progress bar on a terminal, Weights & Biases. None of them can stop a run."""

import json
import logging
import math
import netrc
import os
import queue
import re
import secrets
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from fmnist.config import LogConfig
from fmnist.files import write_atomic

logger = logging.getLogger("fmnist")
RUN_ID = r"[A-Za-z0-9_-]{1,64}"
METRICS_FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_run_id"
# Together below 10 s: what a server that is away, or answers with nothing useful, may cost a start.
PROBE_TIMEOUT_S, INIT_TIMEOUT_S = 2, 5
FINISH_TIMEOUT_S = 30  # what is not sent by then is on disk, for `wandb sync`
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
        self.file: Any = None
        self._warned = False
        try:
            truncate_metrics(self.path, step)
            self.file = self.path.open("ab", buffering=0)  # no buffer: nothing is left in it when the disk is full
        except OSError as error:
            self._warn(error)
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
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:  # where a network disk tells that it was full
                self._warn(error)
        if self.bar is not None:
            self.bar.close()
        self._try_wandb(lambda: self._finish_wandb(summary))

    def _write(self, line: str) -> None:
        if self.file is None:
            return
        data = line.encode() + b"\n"
        try:
            size = os.fstat(self.file.fileno()).st_size
            if self.file.write(data) != len(data):
                os.ftruncate(self.file.fileno(), size)  # no half line for the next one to go on with
                raise OSError("the disk is full")
        except OSError as error:  # a full disk must not end the training that may yet save elsewhere
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning("%s: numbers are missing from here: %s", self.path, error.strerror or error)
        self._warned = True

    def _try_wandb(self, call: Callable[[], Any]) -> None:
        """Call Weights & Biases; at its first failure say so once and go on without it."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            logger.warning("Weights & Biases is off from here: %s", without_secrets(error))
            self.wandb = None

    def _start_wandb(self, directory: Path, cfg: LogConfig, resolved: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)  # set but empty, which the client refuses
        import wandb  # half a second, and absent on some machines: only where it is used

        mode = cfg.wandb
        if mode == "auto":
            mode = "online" if has_api_key() else "offline"
        if mode == "online" and not answers(wandb.setup().settings.base_url):
            logger.warning("Weights & Biases does not answer: offline")
            mode = "offline"
        run_id = _run_id(directory / WANDB_ID_FILE)
        options: dict[str, Any] = {
            "project": cfg.project,
            "name": directory.resolve().name,
            "id": run_id,
            "resume": "allow",
            "dir": str(directory),
            "config": dict(resolved),
        }
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            login_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            silent=True,
            # What may hold a password and is no number: source, the remote's URL, argv, what libraries print.
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            console="off",
        )
        try:
            self.wandb = wandb.init(mode=mode, settings=settings, **options)
        except Exception as error:  # noqa: BLE001 - server away, key refused: the numbers are kept on disk instead
            if mode != "online":
                raise
            logger.warning("Weights & Biases cannot be used (%s): offline", without_secrets(error))
            wandb.teardown()  # else the client still holds the run id of the attempt that failed
            mode, self.wandb = "offline", wandb.init(mode="offline", settings=settings, **options)
        self.wandb.define_metric("step")
        self.wandb.define_metric("*", step_metric="step")
        self.wandb.define_metric("val/top1", step_metric="step", summary="max")
        hint = "" if mode == "online" else f"; send it with: wandb sync {directory}/wandb/offline-run-*-{run_id}"
        logger.info("Weights & Biases: %s, run %s%s", mode, run_id, hint)

    def _finish_wandb(self, summary: Mapping[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            self.wandb.finish()


def _run_id(path: Path) -> str:
    """Return the run's id at Weights & Biases, the one of its first start."""
    try:
        run_id = path.read_text().strip()
    except (OSError, ValueError):
        run_id = ""
    if not re.fullmatch(RUN_ID, run_id):
        run_id = os.environ.get("WANDB_RUN_ID", "")  # a sweep's agent has chosen one
        if not re.fullmatch(RUN_ID, run_id):
            run_id = secrets.token_hex(4)
        path.write_text(run_id + "\n")
    return run_id


def answers(url: str) -> bool:
    """Say whether a server answers at all, with whatever HTTP status, within PROBE_TIMEOUT_S."""
    replies: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S).close()
            replies.put(True)
        except Exception as error:  # noqa: BLE001 - refused, unreachable, no such name, not HTTP
            replies.put(isinstance(error, urllib.error.HTTPError))

    threading.Thread(target=ask, daemon=True).start()  # a thread: a name look-up obeys no timeout
    try:
        return replies.get(timeout=PROBE_TIMEOUT_S)
    except queue.Empty:
        return False


def without_secrets(error: Exception) -> str:
    """Put an error on one line of at most 200 characters, without the key and without passwords of URLs."""
    line = re.sub(r"//[^/@\s]+@", "//***@", " ".join(str(error).split()))
    key = os.environ.get("WANDB_API_KEY")
    return (line.replace(key, "***") if key else line)[:200]


def has_api_key() -> bool:
    """Say whether Weights & Biases would find a key: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own_server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any("wandb" in host or host == own_server for host in hosts)


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
    write_atomic(path, "".join(kept).encode())
