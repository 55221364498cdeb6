"""The environment: its only reader, what each variable does, and what is kept from the libraries.

docs/environment.md is this table in words; a variable that is not in it cannot be read.
"""

import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Literal, NamedTuple


class Variable(NamedTuple):
    """A variable, or all of a pattern: its name, whether it is obeyed, without effect or refused, and its meaning."""

    name: str
    rule: Literal["obeyed", "no effect", "refused"]
    meaning: str


# The first row whose pattern fits a name is the one that counts.
VARIABLES = tuple(
    Variable(*row)
    for row in (
        ("FMNIST_DATA", "obeyed", "folder with Fashion-MNIST, unless `data.root` names one"),
        ("FMNIST_CACHE", "obeyed", "folder for decoded pictures; default $XDG_CACHE_HOME/fmnist or ~/.cache/fmnist"),
        ("FMNIST_EXPECTED_WORLD_SIZE", "obeyed", "set by slurm/train.sbatch: another number of processes is refused"),
        ("FMNIST_*", "no effect", "on the programs; slurm/README.md lists those of the batch scripts"),
        ("ACCELERATE_USE_CPU", "obeyed", "`true`: compute on the CPU, even where there is a GPU"),
        ("ACCELERATE_USE_DEEPSPEED", "refused", "where true: DDP is the one way to train with several processes"),
        ("ACCELERATE_USE_FSDP", "refused", "likewise"),
        ("ACCELERATE_USE_MEGATRON_LM", "refused", "likewise"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "refused", "likewise"),
        ("ACCELERATE_USE_SAGEMAKER", "refused", "likewise"),
        ("ACCELERATE_MIXED_PRECISION", "no effect", "`model.precision` decides; a warning where it asks for another"),
        ("ACCELERATE_DYNAMO_BACKEND", "no effect", "`model.compile` decides; a warning where it asks to compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "no effect", "the batch options decide; a warning unless 1 or auto"),
        ("ACCELERATE_*", "no effect", "hidden from Accelerate, as what its file sets through `accelerate launch`"),
        ("WORLD_SIZE", "obeyed", "number of processes, set by launchers; a wait for one that is missing is reported"),
        ("RANK", "obeyed", "this process among WORLD_SIZE; without effect where that is 1 or not set"),
        ("LOCAL_RANK", "obeyed", "this process on its machine: which GPU it takes; likewise"),
        ("LOCAL_WORLD_SIZE", "obeyed", "processes on this machine, which share its cores"),
        ("MASTER_ADDR", "obeyed", "where the processes meet"),
        ("MASTER_PORT", "obeyed", "likewise"),
        ("TORCHELASTIC_RUN_ID", "obeyed", "set by torchrun: this process ends with its launcher"),
        ("TORCHELASTIC_*", "obeyed", "torchrun's; they decide who reports an error that all processes meet"),
        ("TORCH_ELASTIC_*", "obeyed", "torchrun's"),
        ("PET_*", "obeyed", "torchrun's options; a warning where SLURM's signals would be lost"),
        ("PMI_SIZE", "refused", "above 1, where the processes that MPI started run alone"),
        ("OMPI_COMM_WORLD_SIZE", "refused", "likewise"),
        ("MV2_COMM_WORLD_SIZE", "refused", "likewise"),
        ("SLURM_STEP_NUM_TASKS", "refused", "above 1, where the tasks that srun started run alone"),
        ("SLURM_CPUS_PER_TASK", "obeyed", "the most threads, shared by the processes of a task"),
        ("SLURM_CPUS_ON_NODE", "obeyed", "likewise, where SLURM_CPUS_PER_TASK is not set"),
        ("SLURM_*", "obeyed", "job, nodes and restarts are logged"),
        ("OMP_NUM_THREADS", "obeyed", "threads, unless `threads` is set; not the 1 that launchers set unasked"),
        ("GLOO_SOCKET_IFNAME", "obeyed", "network interface of several processes; one that is absent is refused"),
        ("NCCL_SOCKET_IFNAME", "obeyed", "likewise, on GPUs"),
        ("CUDA_VISIBLE_DEVICES", "obeyed", "GPUs that torch sees; empty: none, so the CPU computes"),
        ("PYTORCH_CUDA_ALLOC_CONF", "obeyed", "torch's memory on a GPU; what is no NAME:VALUE,NAME:VALUE is refused"),
        ("PYTORCH_ALLOC_CONF", "obeyed", "likewise"),
        ("CUBLAS_WORKSPACE_CONFIG", "obeyed", "with `exact`, :4096:8 unless set"),
        ("TRITON_INTERPRET", "obeyed", "1: Triton kernels run interpreted on the CPU; for tests"),
        ("NVIDIA_TF32_OVERRIDE", "no effect", "removed at the start; it would change the arithmetic"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "no effect", "removed too; NVIDIA's container images set it"),
        ("TIMM_*", "no effect", "removed at the start"),
        ("WANDB_MODE", "obeyed", "where `log.wandb` is auto: offline, dryrun or disabled"),
        ("WANDB_DISABLED", "obeyed", "where `log.wandb` is auto: true disables Weights & Biases"),
        ("WANDB_PROJECT", "obeyed", "where `log.project` is left at its default"),
        ("WANDB_NAME", "obeyed", "name of the W&B run, else that of the run directory"),
        ("WANDB_RUN_ID", "obeyed", "id of a new W&B run, as a sweep's agent chooses it"),
        ("WANDB_API_KEY", "obeyed", "key, else that in the netrc file"),
        ("WANDB_IDENTITY_TOKEN_FILE", "obeyed", "likewise"),
        ("WANDB_BASE_URL", "obeyed", "server"),
        ("WANDB_DIR", "no effect", "W&B writes into the run directory"),
        ("WANDB_SAVE_CODE", "no effect", "code is never sent"),
        ("WANDB_CONSOLE", "no effect", "output is never sent"),
        ("WANDB_HOST", "no effect", "the host's name is never sent"),
        ("WANDB_SILENT", "obeyed", "true unless set"),
        ("WANDB_ERROR_REPORTING", "obeyed", "false unless set: no crash reports"),
        ("WANDB_*", "obeyed", "by W&B's client: entity, group, tags, notes, ..."),
        ("NETRC", "obeyed", "file of passwords; else .netrc in the home folder"),
        ("MPLBACKEND", "no effect", "figures are drawn with matplotlib's defaults, without a display"),
        ("MATPLOTLIBRC", "no effect", "likewise; a matplotlibrc file has none either"),
        ("MPLCONFIGDIR", "obeyed", "matplotlib's font cache; a matplotlibrc there has no effect"),
        ("HOME", "obeyed", "caches and settings of the libraries; not needed"),
        ("XDG_CACHE_HOME", "obeyed", "where FMNIST_CACHE is not set: folder of the user's caches"),
        ("CXX", "obeyed", "compiler of torch.compile"),
        ("PYTHONWARNINGS", "no effect", "on errors: a library's warning never ends a program"),
        ("PYTHONHASHSEED", "no effect", ""),
        (
            "PYTHONSAFEPATH",
            "obeyed",
            "by Python: in a clone the programs find no `fmnist`; `pip install .`, or unset it",
        ),
        ("COLUMNS", "obeyed", "width of --help and of the progress bar"),
        ("TQDM_DISABLE", "obeyed", "any value: no progress bar of a training"),
        ("TQDM_*", "no effect", "removed at the start; tqdm ends a program at a value that it cannot read"),
        ("LC_*", "obeyed", "file names; one that is no text in the locale is refused"),
        ("LANG", "obeyed", "likewise"),
    )
)
# Read by a library when it is imported, or by C code: taken away before.
_REMOVED = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TIMM_*", "TQDM_*")
_KEPT = ("TQDM_DISABLE",)
# Settings of torch's allocators: it ends the process by SIGABRT, while it is imported, at any other form.
_SETTING = r"\s*[^\s,:[\]]+\s*:\s*([^\s,:[\]]+|\[[^[\]]*\])\s*"
_SETTINGS = re.compile(rf"\s*|{_SETTING}(,{_SETTING})*,?\s*")
_TRUE, _FALSE = ("1", "true", "yes", "y", "on", "t"), ("", "0", "false", "no", "n", "off", "f")


class _Documented(Mapping[str, str]):
    """The environment, read-only; only what the table names can be read."""

    def __getitem__(self, name: str) -> str:
        assert any(fnmatchcase(name, known.name) for known in VARIABLES), f"{name} is not in the table"
        return os.environ[name]

    def __iter__(self) -> Iterator[str]:
        return iter(os.environ)

    def __len__(self) -> int:
        return len(os.environ)


ENVIRONMENT: Mapping[str, str] = _Documented()


def inherited(**changes: str) -> dict[str, str]:
    """Return the whole environment with some changes, for a child process."""
    return {**os.environ, **changes}


def set_default(name: str, value: str) -> None:
    """Set a variable for a library, unless the user has; one that is set but empty counts as not set."""
    if not ENVIRONMENT.get(name):
        os.environ[name] = value


def unset_empty(name: str) -> None:
    """Remove a variable that is set but empty, which a library would refuse."""
    if not ENVIRONMENT.get(name):
        os.environ.pop(name, None)


def is_true(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Read a variable that is true or false.

    Raises:
        ValueError: it is neither.
    """
    value = (ENVIRONMENT if environ is None else environ).get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise ValueError(f"{name} is {value!r}; valid: true or false")
    return value in _TRUE


def integer(name: str, default: int, environ: Mapping[str, str] = ENVIRONMENT) -> int:
    """Read a whole number; `default`, which is also the smallest that is valid, where it is not set.

    Raises:
        ValueError: it is no whole number, or too small.
    """
    value = environ.get(name, "") or str(default)
    if not (value.isascii() and value.isdigit() and int(value) >= default):
        raise ValueError(f"{name} is {value!r}; valid: a whole number, {default} or more, or not set")
    return int(value)


@contextmanager
def hidden(*patterns: str) -> Iterator[None]:
    """Take away the variables that fit a pattern for the length of a block."""
    names = [name for name in os.environ if any(fnmatchcase(name, pattern) for pattern in patterns)]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def remove_effects() -> None:
    """Take away, at a program's start, what would change arithmetic or turn a library's warning into an error."""
    for name in list(os.environ):
        if any(fnmatchcase(name, pattern) for pattern in _REMOVED) and name not in _KEPT:
            del os.environ[name]
    warnings.filters[:] = [each for each in warnings.filters if each[0] != "error"]  # type: ignore[index]


def check_allocators() -> None:
    """Check, before torch is imported, what would end the process there without a Python error.

    Raises:
        ValueError: one line that names the variable.
    """
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if not _SETTINGS.fullmatch(ENVIRONMENT.get(name, "")):
            raise ValueError(f"{name} is {ENVIRONMENT[name]!r}; valid: NAME:VALUE,..., e.g. expandable_segments:True")


def refused_by_a_library(error: BaseException, trace: TracebackType | None) -> str | None:
    """Name the variable, with its value, that a library could not read while it was imported; None for other errors.

    The error quotes the name or the value, or the failing lines hold the name.
    """
    frames = traceback.extract_tb(trace)
    imported = any(frame.name == "<module>" and "site-packages" in frame.filename for frame in frames)
    for name, value in os.environ.items() if imported and isinstance(error, Exception) else ():
        quoted = len(value) > 2 and re.search(rf"(^|[\s'\"]){re.escape(value)}($|[\s'\",;])", str(error))
        if quoted or any(
            re.search(rf"\b{re.escape(name)}\b", text or "") for text in (str(error), *(f.line for f in frames))
        ):
            return f"{name} is {value!r}"
    return None
