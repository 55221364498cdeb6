"""The environment: its only reader, and what is kept from the libraries.

docs/environment.md says what each variable does; one that is not in its table cannot be read.
"""

import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import TracebackType

# What can be read, * for any ending: docs/environment.md says of each whether it is obeyed, and what it does.
VARIABLES = (
    *("FMNIST_*", "ACCELERATE_*", "TORCHELASTIC_*", "TORCH_ELASTIC_*", "PET_*", "SLURM_*", "WANDB_*"),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TRITON_INTERPRET"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CXX", "NETRC"),
    *("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR", "HOME", "XDG_CACHE_HOME", "COLUMNS", "LC_*", "LANG"),
    *("PYTHONWARNINGS", "PYTHONHASHSEED", "PYTHONSAFEPATH", "TIMM_*", "TQDM_*"),
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
        assert any(fnmatchcase(name, known) for known in VARIABLES), f"{name} is not in the table"
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


def is_true(name: str, environ: Mapping[str, str] = ENVIRONMENT) -> bool:
    """Read a variable that is true or false.

    Raises:
        ValueError: it is neither.
    """
    value = environ.get(name, "").strip().lower()
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
