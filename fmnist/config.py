"""Every option of a run, typed: one frozen dataclass per concern."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fmnist import strict_yaml


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str | None = None
    """Folder with the IDX files, plain or .gz; none: $FMNIST_DATA, data/, the distribution's folder, else fetched."""
    val_size: int = 5000
    """Images held out of the 60,000 for validation, stratified by class; 0 trains on all of them."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    global_batch_size: int = 128
    """Images per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Images of one forward on one process; none: global_batch_size / processes, so no accumulation."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    size: int | dict[int, int] = 28
    """Pixels per side the model sees; or {first epoch: pixels}, e.g. {0: 96, 4: 128, 8: 224}."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    flip_in_turn: bool = False
    """Draw each image's flip once, then take the opposite chance in every second epoch: with flip 0.5 it alternates."""
    rotation: float = 0.0
    """Largest rotation, degrees; the angle is uniform in +-rotation."""
    shift: float = 0.0
    """Largest shift per axis, as a fraction of the side; uniform, whole pixels where nothing is interpolated."""
    scale: float = 0.0
    """Largest zoom s: the factor is log-uniform in [1/(1+s), 1+s]."""
    erase: float = 0.0
    """Probability of erasing one rectangle of 2 to 33 % of the area (filled with the data's mean)."""
    mixup_alpha: float = 0.0
    """Beta parameter of mixup; 0 is off."""
    cutmix_alpha: float = 0.0
    """Beta parameter of CutMix; 0 is off. With both on, each sample takes one of them, half and half."""
    mix_probability: float = 1.0
    """Probability that a sample is mixed, where mixup or CutMix is on."""
    backend: Literal["auto", "triton", "compiled", "eager"] = "auto"
    """What makes the images: one fused Triton kernel, torch.compile, or plain torch; auto: the kernel on a GPU."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "cnn"
    """mlp, cnn, hybrid, or any timm classifier, e.g. convnext_tiny."""
    pretrained: bool = False
    """Start from timm's pretrained weights, from its hub or its cache."""
    weights: str | None = None
    """Start from this local file of pretrained weights (.safetensors, .pt); beats the hub."""
    drop_rate: float = 0.0
    """Dropout probability before the head (in the MLP: after each hidden layer)."""
    drop_path_rate: float = 0.0
    """Stochastic depth probability of the last block (timm models)."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of the model, e.g. {depths: [2, 2, 6, 2]}."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; auto: bf16 on a GPU that has it, fp32 elsewhere."""
    channels_last: bool = False
    """Keep images and convolution weights in the channels_last memory format."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start, faster steps after it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """AdamW, SGD with Nesterov momentum, or Muon for hidden matrices and filters with AdamW for all else."""
    lr: float = 1e-3
    """Peak learning rate, for the global batch as it is (never rescaled behind your back)."""
    weight_decay: float = 0.05
    """Decay of matrices and kernels; norms, biases and layer scales have none."""
    beta1: float = 0.9
    """AdamW's first moment decay; the momentum of SGD and Muon."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    layer_decay: float | None = None
    """Learning rate factor per layer below the head (timm models), e.g. 0.75; none is off."""
    head_lr_scale: float = 1.0
    """Learning rate factor of the classifier head."""
    head_only_epochs: float = 0.0
    """Epochs at the start in which only the head is updated."""
    grad_clip_norm: float | None = None
    """Clip the gradient to this global L2 norm; none is off."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over the classes."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average, which is then what is evaluated; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: float = 10.0
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps in all; beats epochs."""
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; beats warmup_epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine and linear."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_epochs: float = 1.0
    """Epochs between evaluations on the validation images; each saves a checkpoint."""
    every_steps: int | None = None
    """Steps between evaluations; beats every_epochs."""
    batch_size: int = 500
    """Images of one forward on one process."""
    size: int | None = None
    """Pixels per side; none: the last of augment.size."""
    tta: Literal["none", "flip"] = "none"
    """flip: average the probabilities of the image and of its mirror."""
    test: bool = True
    """Evaluate the test images, once, at the end; false while recipes are still compared, which validation decides."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0
    """Steps between checkpoints beside those of the evaluations; 0 is none."""
    keep_last: int = 2
    """Newest checkpoints kept; the best one is kept too."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 50
    """Steps between logged lines; each costs one device sync."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: online where an API key is configured, else offline."""
    project: str = "fmnist"
    """Weights & Biases project."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: sections below, then what concerns all of it."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """How many images a step takes."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What happens to a training image, on the device."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The update."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How long, and the learning rate over time."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation in the run, and the test images at its end."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What a restart continues from."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while it runs."""
    seed: int = 0
    """Seed of everything random: initial weights, order, augmentation, dropout."""
    output_dir: str | None = None
    """Run directory; none: runs/<config name>."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run directory's newest good checkpoint; never: refuse a directory in use."""
    overwrite: bool = False
    """With --resume never: delete the run in output_dir and start again."""
    max_minutes: float | None = None
    """Stop with a checkpoint after this many minutes; the same command goes on."""
    exact: int | None = None
    """V: cut each global batch into V shards and get the same bits on any process count that divides V; none is off."""
    timeout_s: float = 45.0
    """Seconds a process waits for the others in a step, then it ends with the name of the one that hangs."""
    dry_run: bool = False
    """Build everything, print the plan, train nothing."""


def flatten(cfg: Config) -> dict[str, Any]:
    """Return every option of a config under its dotted name, e.g. {"optim.lr": 0.001, ...}."""
    flat: dict[str, Any] = {}
    for key, value in asdict(cfg).items():
        section = getattr(cfg, key)
        flat |= (
            {f"{key}.{k}": v for k, v in value.items()} if hasattr(section, "__dataclass_fields__") else {key: value}
        )
    return flat


def to_yaml(cfg: Config) -> str:
    """Return the resolved config as YAML that --config reads back to an equal Config."""
    return strict_yaml.dump(asdict(cfg))
