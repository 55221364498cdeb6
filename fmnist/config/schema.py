"""Every option of a run: one frozen dataclass per section, each field with its type, default, valid range and meaning.

The docstring behind a field is what `--help` shows.
"""

import ast
import inspect
import json
import re
import sys
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fmnist.config import strict_yaml

WEIGHTS = (".safetensors", ".pt", ".pth")  # of a file of weights
MOST_STEPS = 10**8 - 1  # the names of checkpoints have eight digits


def option(default: Any, *, valid: tuple[float, float]) -> Any:
    """Declare a number with its valid range, both ends included."""
    return field(default=default, metadata={"valid": valid})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = "fashion_mnist"
    """fashion_mnist, mnist, cifar10 and others of torchvision, npz (arrays), or folder (of pictures, by class)."""
    root: str | None = None
    """Where it lies: for Fashion-MNIST a folder with its IDX files, plain or .gz; null: $FMNIST_DATA, data/ or Debian's
    folder, else downloaded."""
    val_size: int = option(5000, valid=(0, 10**8))
    """Training images held out for validation, stratified by class, where the data set has none of its own; 0 trains on
    all of them."""
    stored_size: int | None = option(None, valid=(8, 1024))
    """Pictures of a folder are kept at this many pixels per side; null: as they are if all have one size, else 256."""
    fit: Literal["crop", "pad"] = "crop"
    """How a picture of a folder becomes a square: cut to its centre, or padded. crop leaves pictures that all have one
    size as they are; training stretches them."""
    holdout: float = option(0.1, valid=(0.001, 0.45))
    """Share of each class held out for validation, and as much for the test, of a folder without such splits."""
    bad_files: Literal["refuse", "skip"] = "refuse"
    """Pictures of a folder that cannot be read."""
    limit: int | float | None = option(None, valid=(1e-9, 10**9))
    """Train on so many images, or on a share of them (0.1), the same classes' shares; each part holds the smaller ones.
    Validation and test images stay whole. null: all."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """Order of an epoch; uniform: each image once; balanced: all classes equally often, small ones repeated."""
    folds: int | None = option(None, valid=(2, 1000))
    """Deal all training images, those of val_size too, to this many folds, each class evenly and always in the same
    way; null: no folds."""
    fold: int | None = option(None, valid=(0, 999))
    """The fold that is held out for validation, 0 to folds - 1; a run of each gives `fmnist audit` predictions of every
    image by a model that was not trained on it."""
    corrections: str | None = None
    """CSV file of `fmnist audit`, whose decisions to relabel and drop change the training images; null: none."""
    where: Literal["auto", "device", "spread", "host"] = "auto"
    """Where the images of a run lie; device: all on each process's device; spread: each process holds its share, and a
    batch is exchanged; host: in host memory; auto: the first of these that has room for them."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    global_batch_size: int = option(128, valid=(1, 10**6))
    """Images per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | Literal["auto"] | None = option(None, valid=(1, 60_000))
    """Images per forward pass on one process; null: global_batch_size / processes, without accumulation; auto: as many
    as fit into memory, tried at the start and kept for the run."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    size: int | dict[int, int] = option(28, valid=(8, 1024))
    """Image size in pixels per side, or {first epoch: pixels}, e.g. {0: 96, 4: 128, 8: 224}."""
    flip: float = option(0.5, valid=(0, 1))
    """Probability of a horizontal flip."""
    flip_in_turn: bool = False
    """Draw each image's flip once, then take the opposite chance in every second epoch: with flip 0.5 it alternates."""
    flip_vertical: float = option(0.0, valid=(0, 1))
    """Probability of a vertical flip."""
    crop: float = option(1.0, valid=(0.01, 1))
    """Smallest share of the area in a random crop, which is resized to the full size; uniform in [crop, 1]; 1: none."""
    crop_aspect: float = option(1.33, valid=(1, 4))
    """Largest change a of a crop's aspect ratio: log-uniform in [1/a, a] times the image's own, as far as it fits."""
    rotation: float = option(0.0, valid=(0, 180))
    """Maximum rotation in degrees; the angle is uniform in +-rotation."""
    shift: float = option(0.0, valid=(0, 0.5))
    """Maximum shift per axis as a fraction of the side; uniform, in whole pixels if nothing else is interpolated."""
    scale: float = option(0.0, valid=(0, 1))
    """Maximum zoom s; the factor is log-uniform in [1/(1+s), 1+s]."""
    trivial: float = option(0.0, valid=(0, 1))
    """Probability of one of TrivialAugment's shears (+-0.3), shifts (+-31 %) or rotation (+-30 degrees), besides."""
    brightness: float = option(0.0, valid=(0, 1))
    """Maximum change b of brightness; values are multiplied by a factor uniform in [1-b, 1+b]."""
    contrast: float = option(0.0, valid=(0, 1))
    """Maximum change c of contrast; distances from the data set's mean grey take a factor uniform in [1-c, 1+c]."""
    saturation: float = option(0.0, valid=(0, 1))
    """Maximum change s of saturation; distances from a pixel's own grey take a factor uniform in [1-s, 1+s]."""
    hue: float = option(0.0, valid=(0, 0.5))
    """Maximum change of hue in turns; colours rotate about the grey axis of YIQ by an angle uniform in +-hue."""
    erase: float = option(0.0, valid=(0, 1))
    """Probability of erasing one rectangle of 2 to 33 % of the area (filled with the data set's mean)."""
    mixup_alpha: float = option(0.0, valid=(0, 10))
    """Beta parameter of mixup; 0 disables it."""
    cutmix_alpha: float = option(0.0, valid=(0, 10))
    """Beta parameter of CutMix; 0 disables it. With both enabled, each sample uses one of them, with equal odds."""
    mix_probability: float = option(1.0, valid=(0, 1))
    """Probability that a sample is mixed if mixup or CutMix is enabled."""
    backend: Literal["auto", "triton", "compiled", "eager"] = "auto"
    """Implementation: fused Triton kernel, torch.compile, or plain PyTorch; auto: the kernel on a GPU."""

    @property
    def interpolates(self) -> bool:
        """Say whether pixels come to lie between others even at the stored size."""
        return bool(self.rotation or self.scale or self.trivial or self.crop < 1)

    @property
    def sizes(self) -> dict[int, int]:
        """Return `size` as {first epoch: pixels}."""
        return self.size if isinstance(self.size, dict) else {0: self.size}

    @property
    def mixes(self) -> bool:
        """Say whether another image may be mixed into each."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "cnn"
    """mlp, cnn, hybrid, wide_resnet, or any timm classifier, e.g. convnext_tiny."""
    pretrained: bool = False
    """Start from timm's pretrained weights, from its hub or its cache."""
    weights: str | None = None
    """Start from a run of yours or one of its checkpoints (a directory), with a new head where the classes differ; or,
    for a timm model, from a local file of pretrained weights (.safetensors, .pt), which overrides the hub."""
    drop_rate: float = option(0.0, valid=(0, 0.95))
    """Dropout probability before the head (in the MLP: after each hidden layer)."""
    drop_path_rate: float = option(0.0, valid=(0, 0.95))
    """Stochastic depth probability of the last block (timm models)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the model, e.g. {depths: [2, 2, 6, 2]}; another model.name drops a recipe's."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; auto: bf16 on a GPU that supports it, fp32 elsewhere."""
    channels_last: bool = False
    """Keep images and convolution weights in the channels_last memory format."""
    compile: bool = False
    """Compile the model with torch.compile: about a minute at the start, faster steps afterwards."""
    cuda_graph: Literal["auto", "never"] = "auto"
    """Launch a step's kernels as one CUDA graph, with the same result; auto: where one process trains on a GPU."""
    depthwise: Literal["auto", "conv", "matmul", "triton"] = "auto"
    """Depthwise convolutions in training; auto: on a CPU as matrix products where those are faster (maps of 8 x 8 and
    less), and ConvNeXt's 1 x 1 and patch convolutions as linear layers; matmul: on any device, up to 16 x 16; triton:
    by our kernel, on a CUDA device, sides of 3, 5, 7 or 9 with stride 1; conv: as convolutions. The weights are the
    same."""

    @property
    def starts_from_run(self) -> bool:
        """Whether `weights` names a run or a checkpoint: told by its name alone, for it may be gone later."""
        return self.weights is not None and not self.weights.endswith(WEIGHTS)

    @property
    def has_pretrained_input(self) -> bool:
        """Whether channels and normalisation are those of timm's pretrained weights; another run's are given."""
        return self.pretrained or (self.weights is not None and not self.starts_from_run)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """AdamW, SGD with Nesterov momentum, or Muon for hidden matrices and filters with AdamW for all else."""
    lr: float = option(1e-3, valid=(0, 100))
    """Peak learning rate for the configured global batch size; never rescaled."""
    weight_decay: float = option(0.05, valid=(0, 10))
    """Weight decay of matrices and kernels; norms, biases and layer scales are exempt."""
    beta1: float = option(0.9, valid=(0, 0.9999))
    """AdamW: decay of the first moment; SGD and Muon: momentum."""
    beta2: float = option(0.999, valid=(0, 0.99999))
    """AdamW: decay of the second moment."""
    layer_decay: float | None = option(None, valid=(0.01, 1))
    """Learning rate factor per layer below the head (timm models), e.g. 0.75; null disables it."""
    head_lr_scale: float = option(1.0, valid=(0, 1000))
    """Learning rate factor of the classifier head."""
    head_only_epochs: float = option(0.0, valid=(0, 10_000))
    """Epochs at the start that update only the head; statistics of batch norms follow the images nevertheless."""
    grad_clip_norm: float | None = option(None, valid=(1e-6, 10**6))
    """Clip the gradient of all parameters to this global L2 norm; null disables it."""
    label_smoothing: float = option(0.0, valid=(0, 0.9))
    """Probability mass spread evenly over the classes."""
    class_weights: Literal["none", "balanced"] | list[float] = option("none", valid=(1e-6, 10**6))
    """Weight of each class in the training loss; balanced: images / (classes * images of the class), or one number a
    class, e.g. [1, 1, 2.5]. The loss is the weighted mean over the global batch."""
    ema_decay: float = option(0.0, valid=(0, 0.99999))
    """Decay per step of the moving average of the weights, which is evaluated in their place; 0 disables it. It warms
    up: at most 1 - step^(-2/3), 0.99 from step 1,000 on and 0.999 from 31,623."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: float = option(10.0, valid=(1e-6, 100_000))
    """Passes over the training images."""
    steps: int | None = option(None, valid=(1, MOST_STEPS))
    """Total optimizer steps; overrides epochs."""
    minutes: float | None = option(None, valid=(0.01, 10**6))
    """Minutes that the whole run may take, from the program's start to its last file, in place of epochs: fifty steps
    on a scratch copy are timed, then the number of steps is fixed and kept. null: epochs or steps decide."""
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_epochs: float = option(0.0, valid=(0, 100_000))
    """Epochs of linear warm-up from 0; if that is not shorter than the run, a tenth of the run."""
    warmup_steps: int | None = option(None, valid=(0, 10**9))
    """Steps of linear warm-up; overrides warmup_epochs."""
    min_lr: float = option(0.0, valid=(0, 100))
    """Learning rate at the end of cosine and linear; at most optim.lr."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_epochs: float = option(1.0, valid=(1e-6, 100_000))
    """Epochs between evaluations on the validation images; what each saves: checkpoint.every_steps."""
    every_steps: int | None = option(None, valid=(1, 10**9))
    """Steps between evaluations; overrides every_epochs."""
    batch_size: int = option(500, valid=(1, 10**6))
    """Images per forward pass on one process."""
    size: int | None = option(None, valid=(8, 1024))
    """Image size in pixels per side; null: the last of augment.size, and while smaller images are trained, theirs."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation; flip: average the probabilities of the image and its mirror image."""
    best: Literal["top1", "macro_f1", "loss"] = "top1"
    """Validation number that decides which epoch's weights are kept; macro_f1 counts every class alike."""
    test: bool = True
    """Evaluate the test images, once, at the end; false while recipes are still compared, which validation decides."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = option(0, valid=(0, 10**9))
    """Steps between full checkpoints, and one at the end; 0: one per evaluation. Evaluations in between save only
    weights, and only the best so far."""
    keep_last: int = option(2, valid=(1, 10_000))
    """Number of newest checkpoints kept; the best one is kept too."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = option(50, valid=(1, 10**9))
    """Steps between logged lines; each costs one device sync."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online if an API key is configured, otherwise offline."""
    project: str = "fmnist"
    """Weights & Biases project: 1 to 64 letters, digits, dots, dashes and underscores."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: the sections, then what concerns all of them."""

    data: DataConfig = field(default_factory=DataConfig)
    """images to train on"""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """images per step"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """random changes to the training images, on the device"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the network"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """the optimizer"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """length of the run, and the learning rate over time"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """validation during the run, test images at its end"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """what a restart resumes from"""
    log: LogConfig = field(default_factory=LogConfig)
    """metrics and trackers"""
    seed: int = option(0, valid=(0, 2**31 - 1))
    """Seed of all randomness: initial weights, order, augmentation, dropout."""
    output_dir: str | None = None
    """Run directory; null: runs/<config name>."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest valid checkpoint; never: refuse a non-empty directory."""
    overwrite: bool = False
    """With --resume never: delete the run in output_dir and start again."""
    max_minutes: float | None = option(None, valid=(0.001, 10**7))
    """Stop with a checkpoint after this many minutes; rerun the same command to resume. null disables it."""
    exact: int | None = option(None, valid=(1, 4096))
    """Split each global batch into V shards, so that results are bit-identical for any process count that divides V;
    null disables it."""
    threads: int | None = option(None, valid=(1, 1024))
    """CPU threads of each process; null: OMP_NUM_THREADS, else its share of the cores that the job was given. Bits of a
    CPU run depend on their number, except with --exact, which uses one."""
    timeout_s: float = option(45.0, valid=(1, 86_400))
    """Seconds that a process waits for the others in a step before it ends and names the one that hangs."""
    profile: int | None = option(None, valid=(1, 1000))
    """Trace this many steps after the first ten; writes a trace and a table to profile/. null disables it."""
    dry_run: bool = False
    """Build everything, print the plan, train nothing."""


TYPE_NAMES = {int: "int", float: "float", str: "text", bool: "true|false", NoneType: "null", Any: "value"}
UNIONS = (UnionType, Union)  # int | None; one with a Literal is of the second kind
SECTIONS: dict[str, Any] = {outer.name: outer.type for outer in fields(Config) if is_dataclass(outer.type)}
# Each option's field under its dotted name, e.g. "optim.lr".
OPTIONS: dict[str, Field[Any]] = {
    f"{outer.name}.{inner.name}" if outer.name in SECTIONS else outer.name: inner
    for outer in fields(Config)
    for inner in (fields(SECTIONS[outer.name]) if outer.name in SECTIONS else [outer])
}


@cache
def meanings() -> dict[str, str]:
    """Return the docstring behind each section and option, with its valid range, under its dotted name."""
    prefixes = {"Config": ""} | {kind.__name__: f"{name}." for name, kind in SECTIONS.items()}
    texts = {}
    for owner in ast.parse(inspect.getsource(sys.modules[__name__])).body:
        if isinstance(owner, ast.ClassDef):
            for line, text in pairwise(owner.body):
                if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr):
                    name = prefixes[owner.name] + ast.unparse(line.target)
                    limits = OPTIONS[name].metadata.get("valid") if name in OPTIONS else None
                    valid = " Valid range: {} to {}.".format(*limits) if limits else ""
                    texts[name] = " ".join(ast.literal_eval(text.value).split()) + valid
    return texts


def type_name(kind: Any) -> str:
    """Return a field's type as a user may write it: int, float|null, auto|never, {int: int}."""
    if get_origin(kind) in (*UNIONS, Literal):
        return "|".join(map(type_name, get_args(kind)))
    if get_origin(kind) is list:
        return "[" + type_name(get_args(kind)[0]) + ", ...]"
    if get_origin(kind) is dict:
        return "{" + ": ".join(map(type_name, get_args(kind))) + "}"
    return kind if isinstance(kind, str) else TYPE_NAMES[kind]


def convert(name: str, value: Any) -> Any:
    """Return a value read from YAML as the type of its option.

    Raises:
        ValueError: it is of another type; one line.
    """
    try:
        return _typed(value, OPTIONS[name].type)
    except (TypeError, OverflowError):  # of another type; an integer that no float can hold
        raise ValueError(f"{name} is {value!r:.100}; expected {type_name(OPTIONS[name].type)}") from None


def _typed(value: Any, kind: Any) -> Any:
    if get_origin(kind) in UNIONS:
        for choice in get_args(kind):
            with suppress(TypeError):
                return _typed(value, choice)
    if get_origin(kind) is dict and isinstance(value, dict):
        key_kind, value_kind = get_args(kind)
        # JSON has text keys: {"0": 16}
        keys = [int(key) if key_kind is int and str(key).isdecimal() else _typed(key, key_kind) for key in value]
        if len(set(keys)) == len(keys):
            return dict(zip(keys, [_typed(inner, value_kind) for inner in value.values()], strict=True))
    if get_origin(kind) is list and isinstance(value, list) and value:
        return [_typed(inner, get_args(kind)[0]) for inner in value]
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any or type(value) is kind or (get_origin(kind) is Literal and value in get_args(kind)):
        return value
    raise TypeError


def check_values(cfg: Config) -> None:
    """Refuse a value that its option cannot take, whatever the others are.

    Raises:
        ValueError: one line with the option, its value and the valid range.
    """
    for name, value in flatten(cfg).items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            encoding = sys.getfilesystemencoding()
            raise ValueError(f"{name} is {value[:100]!r}: no text in this locale ({encoding}); set LC_ALL=C.UTF-8")
        if isinstance(value, str) and not (value.isprintable() and 0 < len(value) <= 4096 and value.strip()):
            raise ValueError(f"{name} is {value[:100]!r}; valid: 1 to 4096 printable characters")
        if limits := OPTIONS[name].metadata.get("valid"):
            low, high = limits
            numbers = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if any(isinstance(number, int | float) and not low <= number <= high for number in numbers):  # NaN, too
                raise ValueError(f"{name} is {value!s:.100}; valid range: {low} to {high}")
    if isinstance(cfg.data.limit, float) and cfg.data.limit > 1:
        raise ValueError(f"data.limit is {cfg.data.limit}; valid: a whole number of images, or a share up to 1.0")
    size = cfg.augment.size
    if isinstance(size, dict) and (0 not in size or min(size) < 0):
        raise ValueError(f"augment.size is {size}; valid: {{0: pixels, later epoch: pixels}}")
    try:  # JSON has no NaN, which would not equal itself at the next start
        json.dumps(cfg.model.options, allow_nan=False)
    except (ValueError, TypeError):
        raise ValueError(
            "model.options holds a number that is not finite; valid: finite numbers, text, lists"
        ) from None
    check_name("log.project", cfg.log.project)


def check_name(what: str, text: str) -> None:
    """Refuse a name that Weights & Biases would refuse."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ValueError(f"{what} is {text[:100]!r}; valid: 1 to 64 of A-Z, a-z, 0-9, dot, dash, underscore")


def flatten(cfg: Config) -> dict[str, Any]:
    """Return every option of a config under its dotted name, e.g. {"optim.lr": 0.001, ...}."""
    return {name: attrgetter(name)(cfg) for name in OPTIONS}


def unflatten(options: dict[str, Any]) -> Config:
    """Return the config whose options, all of them, are given under their dotted names: the inverse of `flatten`."""
    tree: dict[str, Any] = {section: {} for section in SECTIONS}
    for name, value in options.items():
        section, _, key = name.rpartition(".")
        (tree[section] if section else tree)[key] = value
    return Config(**tree | {section: SECTIONS[section](**tree[section]) for section in SECTIONS})


def to_yaml(cfg: Config) -> str:
    """Return the resolved config as YAML that --config reads back to an equal Config."""
    return strict_yaml.dump(asdict(cfg))
