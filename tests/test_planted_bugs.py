"""Twenty-four bugs, planted one at a time in a copy of the source: the test named beside each must fail there.

Row R16 of the table in README.md. Each names a function; what is replaced occurs exactly once in it.
"""

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, environment, execute


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A text that is replaced in a function, and the tests that must notice (file and -k expression)."""

    name: str
    function: str
    old: str
    new: str
    test: str
    select: str


BUGS = (
    Bug(
        name="the moving average's count is lost at a restart",
        function="fmnist.step.train_step",
        old="step=batch.step",
        new="step=1",
        test="test_step.py",
        select="warms_up_by_the_steps",
    ),
    Bug(
        name="no fsync",
        function="fmnist.runtime.files.sync_path",
        old="os.fsync(descriptor)",
        new="pass",
        test="test_checkpoint.py",
        select="on_the_disk_before",
    ),
    Bug(
        name="a wrong divisor in accumulation",
        function="fmnist.runtime.gradients.AllReduce.backward",
        old="loss / self._num_micro_batches",
        new="loss / 1",
        test="test_step.py",
        select="accumulation_k_times_b",
    ),
    Bug(
        name="the epoch is not in the seed",
        function="fmnist.data.batches.epoch_generator",
        old="mix_key(seed, epoch, purpose)",
        new="mix_key(seed, purpose)",
        test="test_batches.py",
        select="epochs_and_seeds_differ",
    ),
    Bug(
        name="evaluation leaves out the last, incomplete batch",
        function="fmnist.metrics.predict",
        old="range(0, len(split), cfg.batch_size)",
        new="range(0, len(split) - cfg.batch_size + 1, cfg.batch_size)",
        test="test_metrics.py",
        select="shares_add_up and 7-1-5",
    ),
    Bug(
        name="processes' shares of an evaluation overlap, as padding makes them",
        function="fmnist.runtime.processes.Processes.share",
        old="items[first:last]",
        new="items[first : last + 1]",
        test="test_batches.py",
        select="evaluation_shares",
    ),
    Bug(
        name="the best step is not kept with the best value",
        function="fmnist.checkpoint.contents.TrainState.update_best",
        old="self.best_step = self.step",
        new="pass",
        test="test_checkpoint.py",
        select="best_changes_only",
    ),
    Bug(
        name="a file has its name before its content",
        function="fmnist.runtime.files.write_atomic",
        old="file.flush()",
        new="pass",
        test="test_files.py",
        select="content_is_on_the_disk",
    ),
    Bug(
        name="the learning rate is one step late",
        function="fmnist.optim.Schedule.lr",
        old="self.peak_lr * (step + 1) / self.warmup_steps",
        new="self.peak_lr * step / self.warmup_steps",
        test="test_optim.py",
        select="cosine_with_warm_up",
    ),
    Bug(
        name="weight decay on biases and norms",
        function="fmnist.optim.parameter_groups",
        old='"weight_decay": group["weight_decay"],',
        new='"weight_decay": cfg.weight_decay,',
        test="test_optim.py",
        select="vectors_have_no_decay and cnn",
    ),
    Bug(
        name="the same dropout masks in every step",
        function="fmnist.data.batches.MicroBatch.seed",
        old="mix_key(*self.key)",
        new="mix_key(self.key[0], self.key[2])",
        test="test_step.py",
        select="dropout_masks_differ",
    ),
    Bug(
        name="mixup's partner comes from another batch",
        function="fmnist.data.batches.Loader.micro_batches",
        old="partners=reverse[part]",
        new="partners=order.flip(0)[part]",
        test="test_batches.py",
        select="partners_mirror",
    ),
    Bug(
        name="label smoothing is dropped",
        function="fmnist.step.mean_loss",
        old=", label_smoothing=cfg.label_smoothing)",
        new=")",
        test="test_step.py",
        select="label_smoothing",
    ),
    Bug(
        name="a restart loses the optimizer's moments",
        function="fmnist.training.resume.restore",
        old="    load_optimizer_tensors(model, optimizer, read_tensors(moments), moments)\n",
        new="",
        test="test_exactness.py",
        select="thirty_preemptions and mlp",
    ),
    Bug(
        name="a restart takes the optimizer's moments in another order of memory",
        function="fmnist.checkpoint.tensors.load_optimizer_tensors",
        old="tensor if counts else",
        new="tensor if True else",
        test="test_checkpoint.py",
        select="restored_optimizer",
    ),
    Bug(
        name="a restart forgets the training time",
        function="fmnist.training.build._clock",
        old="state.train_seconds, least_seconds",
        new="0.0, least_seconds",
        test="test_exactness.py",
        select="training_time_adds_up",
    ),
    Bug(
        name="the processes' slices of a global batch overlap",
        function="fmnist.data.batches.Loader._part",
        old="(accumulation * self.world_size + rank) * self.micro_batch_size",
        new="(accumulation + rank) * self.micro_batch_size",
        test="test_batches.py",
        select="same_micro_batches",
    ),
    Bug(
        name="mean and deviation are swapped",
        function="fmnist.data.augment_torch.normalize",
        old="(image - mean) / std for image, mean, std in",
        new="(image - mean) / std for image, std, mean in",
        test="test_augment.py",
        select="normalisation_gives_mean_0",
    ),
    Bug(
        name="no image is ever flipped",
        function="fmnist.data.augment_table._inverse_affine",
        old="u[FLIP] < cfg.flip",
        new="u[FLIP] < 0 * cfg.flip",
        test="test_augment.py",
        select="image_or_its_mirror",
    ),
    Bug(
        name="each process evaluates with its own BatchNorm statistics",
        function="fmnist.metrics.predict",
        old="processes.broadcast(model.buffers())",
        new="list(model.buffers())",
        test="test_exactness.py",
        select="weights_and_statistics_that_are_saved",
    ),
    Bug(
        name="old checkpoints are dropped before the new one has its name",
        function="fmnist.checkpoint.store.Checkpoints._publish",
        old="        part.rename(final)\n        sync_path(self.directory)  #",
        new="        self._prune(state)\n        part.rename(final)\n        sync_path(self.directory)  #",
        test="test_checkpoint.py",
        select="last_k_and_the_best",
    ),
    Bug(
        name="a checkpoint is not copied before the next step",
        function="fmnist.training.save._begin",
        old="{name: apart(tensors) for",
        new="{name: dict(tensors) for",
        test="test_exactness.py",
        select="written_beside",
    ),
    Bug(
        name="accuracy is the mean of batches, the short one too",
        function="fmnist.metrics.score",
        old='"top1": in_float64(predictions == labels).mean(),',
        new='"top1": torch.stack([b.double().mean() for b in (predictions == labels).split(300)]).mean(),',
        test="test_metrics.py",
        select="equals_scikit_learn",
    ),
    Bug(
        name="exact sums shards in the order of the processes",
        function="fmnist.runtime.processes.Processes.gather_shards",
        old="torch.stack(gathered, dim=1).flatten(0, 1)",
        new="torch.stack(gathered).flatten(0, 1)",
        test="test_exactness.py",
        select="through_4_2_1_and_4_processes and mlp",
    ),
    Bug(
        name="metrics of steps that are made again stay in the file",
        function="fmnist.tracking.metrics_file.truncate_metrics",
        old='if entry["step"] <= step and',
        new='if entry["step"] <= step + 1 and',
        test="test_exactness.py",
        select="thirty_preemptions and mlp",
    ),
)


def find(function: str, root: Path = ROOT) -> tuple[Path, int, int]:
    """Return a function's file, and its first and last line, from 0 and without the last."""
    parts = function.split(".")
    for count in range(len(parts), 0, -1):
        path = root.joinpath(*parts[:count]).with_suffix(".py")
        if path.is_file():
            break
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    for name in parts[count:]:
        nodes = [node for node in ast.iter_child_nodes(nodes[0]) if getattr(node, "name", None) == name]
        assert len(nodes) == 1, function
    return path, nodes[0].lineno - 1, nodes[0].end_lineno  # type: ignore[attr-defined]


def copy_of_the_source(folder: Path) -> Path:
    folder.mkdir()
    for name in ("fmnist", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def run_tests(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The loop with one process is tested through forks in the copy, never with this tree's modules.
    env = environment() | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    return execute(
        sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *arguments, env=env, cwd=source
    )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_what_a_bug_replaces_is_there_once(bug: Bug) -> None:
    path, first, last = find(bug.function)
    assert "".join(path.read_text().splitlines(keepends=True)[first:last]).count(bug.old) == 1
    assert bug.old != bug.new
    assert (ROOT / "tests" / bug.test).is_file()


def test_there_are_twenty_of_them_and_their_names_differ() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("test", sorted({bug.test for bug in BUGS}))
def test_without_a_bug_the_named_tests_pass(test: str, tmp_path: Path) -> None:
    select = " or ".join(f"({bug.select})" for bug in BUGS if bug.test == test)
    done = run_tests(copy_of_the_source(tmp_path / "source"), f"tests/{test}", "-k", select)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed >= len({bug.select for bug in BUGS if bug.test == test})


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    source = copy_of_the_source(tmp_path / "source")
    path, first, last = find(bug.function, source)
    lines = path.read_text().splitlines(keepends=True)
    body = "".join(lines[first:last]).replace(bug.old, bug.new)
    path.write_text("".join([*lines[:first], body, *lines[last:]]))
    done = run_tests(source, f"tests/{bug.test}", "-k", bug.select)
    # 1: tests failed; not 2 to 5, which say that none could be run.
    assert done.returncode == 1, f"not caught: {bug.name}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert "1 failed" in done.stdout
