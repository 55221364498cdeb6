"""The weights that a run begins from, where `model.weights` names another run or one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from fmnist.checkpoint.contents import MODEL, is_checkpoint, verify, weights_to_use
from fmnist.checkpoint.run_directory import read_summary
from fmnist.checkpoint.store import newer_than_weights
from fmnist.config.parse import load_config
from fmnist.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """Where another run's weights to use are.

    Attributes:
        run: the run directory.
        file: safetensors.
        sha256: what it has to have; empty where its run says nothing.
        cfg: the run's config.
    """

    run: Path
    file: Path
    sha256: str
    cfg: Config


def find_start_weights(weights: str) -> StartWeights:
    """Find the weights of a checkpoint, or those that commands use of a run: its newest where it trained on since.

    Args:
        weights: `model.weights`, a directory.

    Raises:
        ValueError: it is neither, or nothing in it verifies; one line.
    """
    path = Path(weights).resolve()
    try:
        named = is_checkpoint(path)
        run = path.parent.parent if named else path
        cfg, summary = load_config(run / "config.yaml"), read_summary(run)
        checkpoint = path if named else newer_than_weights(run, summary)
        if checkpoint is not None:
            digests = verify(checkpoint)
            file = weights_to_use(checkpoint, digests)
            return StartWeights(run=run, file=file, sha256=digests[file.name], cfg=cfg)
    except ValueError as error:
        raise ValueError(f"model.weights: {weights} cannot be used: {error}") from None
    sha256 = summary.get("weights_sha256")
    return StartWeights(run=run, file=run / MODEL, sha256=sha256 if isinstance(sha256, str) else "", cfg=cfg)
