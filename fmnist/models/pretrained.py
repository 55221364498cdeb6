"""Any timm model, from scratch or from pretrained weights with a new head and a one-channel stem."""

import inspect
import logging
import re
from typing import Any, cast

import timm
from torch import nn

from fmnist.config.schema import ModelConfig
from fmnist.models.stem import Normalization, to_one_channel
from fmnist.models.trial import try_model
from fmnist.models.weights import fetch_weights, mismatches, read_weights

log = logging.getLogger("fmnist")

# Not for model.options: set by this project, or they would read files or change what the model returns.
RESERVED = {
    *("self", "args", "kwargs", "num_classes", "in_chans", "img_size", "dynamic_img_size"),
    *("drop_rate", "drop_path_rate", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("pretrained_strict", "pretrained_custom_load", "pretrained_filter_fn", "checkpoint_path", "cache_dir"),
    *("features_only", "feature_cls", "out_indices", "scriptable", "exportable", "no_jit", "pruned"),
    *("device", "dtype"),
}


def build_timm(
    cfg: ModelConfig, num_classes: int, normalization: Normalization, sizes: list[int], load_weights: bool
) -> tuple[nn.Module, Normalization]:
    """Build a timm model for `build_model`.

    Args:
        cfg: its name is known to timm.
        num_classes: logits per image.
        normalization: of the images, of one channel or three; what a model trained from scratch takes.
        sizes: distinct image sizes in pixels; the first is the one of the last epochs and of evaluation.
        load_weights: read or fetch the pretrained weights; otherwise build only the structure for them.

    Returns:
        The model and the normalization of its images.

    Raises:
        ValueError: an option or size the model does not take, a head that cannot be used, or weights that are
            missing or do not fit.
    """
    try:
        pretrained_cfg = timm.get_pretrained_cfg(cfg.name)
    except RuntimeError as error:  # an unknown tag after the dot
        raise ValueError(f"model.name: {error}") from error
    if not cfg.has_pretrained_input:
        channels = len(normalization.mean)
        model = _create(cfg, num_classes, channels, sizes)
        try:
            try_model(model, cfg.name, channels, sizes)
        except ValueError:  # some read colour only: CSATv2 splits RGB into frequencies
            if channels == 3:
                raise
            model = _create(cfg, num_classes, 3, sizes)
            try_model(model, cfg.name, 3, sizes)
            log.info("%s needs three channels: grey images are repeated as RGB", cfg.name)
            return model, Normalization(normalization.mean * 3, normalization.std * 3)
        return model, normalization

    if pretrained_cfg is None:
        raise ValueError(f"model.name: timm has no pretrained form of {cfg.name}")
    model = _create(cfg, num_classes, 3, sizes)
    if load_weights and not cfg.starts_from_run:
        _load(model, cfg, sizes)
    if len(normalization.mean) == 1:
        return model, to_one_channel(model, cfg.name, sizes)
    try_model(model, cfg.name, 3, sizes)
    statistics = cast(dict[str, Any], model.pretrained_cfg)
    return model, Normalization(tuple(statistics["mean"]), tuple(statistics["std"]))


def _create(cfg: ModelConfig, num_classes: int, in_chans: int, sizes: list[int], **weights: Any) -> nn.Module:
    """Call timm's constructor; an argument it does not take is a ValueError naming our key."""
    if reserved := sorted(RESERVED & set(cfg.options)):
        raise ValueError(f"model.options: {', '.join(reserved)} cannot be set here")
    pretrained_cfg = timm.get_pretrained_cfg(cfg.name)
    kwargs: dict[str, Any] = {"drop_rate": cfg.drop_rate, "drop_path_rate": cfg.drop_path_rate}
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        kwargs |= {"img_size": sizes[0]} | ({"dynamic_img_size": True} if len(sizes) > 1 else {})
    common = {"num_classes": num_classes, "in_chans": in_chans} | cfg.options | weights

    while True:
        try:
            model = timm.create_model(cfg.name, **kwargs, **common)
            break
        except TypeError as error:
            match = re.search(r"keyword argument[^']*'(\w+)'", str(error))
            key = match[1] if match else ""
            if key not in ("drop_rate", "drop_path_rate") or kwargs[key] != 0:
                raise _refusal(cfg, key, sizes, error) from error
            del kwargs[key]  # the model has no such dropout, and none was requested
        except Exception as error:  # timm's constructors raise anything on an option that they do not expect
            raise _refusal(cfg, "", sizes, error) from error
    if ignored := set(cfg.options) - _parameters(model):  # a **kwargs on the way to the constructor dropped it
        raise _refusal(cfg, min(ignored), sizes, TypeError("it has no effect"))
    return model


def _refusal(cfg: ModelConfig, key: str, sizes: list[int], error: Exception) -> ValueError:
    if key in ("img_size", "dynamic_img_size"):
        what = "several image sizes" if key == "dynamic_img_size" else "another image size than timm's"
        return ValueError(f"augment.size: {cfg.name} does not take {what} ({', '.join(map(str, sizes))} px)")
    if key in ("drop_rate", "drop_path_rate"):
        return ValueError(f"model.{key} {getattr(cfg, key)} has no effect: {cfg.name} does not take it; valid: 0")
    if key in cfg.options:
        valid = ", ".join(sorted(_parameters(timm.create_model(cfg.name)) - {key}))
        return ValueError(f"model.options: {cfg.name} does not take {key}; valid: {valid}")
    where = f"model.options: {cfg.options}" if cfg.options else "model.name"
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return ValueError(f"{where}: timm cannot build {cfg.name} for {sizes[0]} px: {reason}")


def _parameters(model: nn.Module) -> set[str]:
    classes = [cls for cls in type(model).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    return {name for cls in classes for name in inspect.signature(cls).parameters} - RESERVED


def _load(model: nn.Module, cfg: ModelConfig, sizes: list[int]) -> None:
    """Load all tensors but the head's, strictly; the head keeps its random initialisation."""
    tensors = read_weights(cfg.weights) if cfg.weights else fetch_weights(cfg.name)
    pretrained_cfg = cast(dict[str, Any], model.pretrained_cfg)
    heads = pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
    own = model.state_dict()
    head = {key: value for key, value in own.items() if key.startswith(prefixes)}
    body = {key: value for key, value in tensors.items() if not key.startswith(prefixes)}

    if misfits := mismatches(body, {key: value for key, value in own.items() if key not in head}):
        source = f"model.weights: {cfg.weights}" if cfg.weights else f"model.pretrained: {cfg.name}"
        misfit = ValueError(f"{source} does not fit {cfg.name}: {'; '.join(misfits.values())}")
        if "of another type" in misfits:  # load_state_dict would cast it silently
            raise misfit
        # Position embeddings for another image size, or the names of the paper's repository: timm converts
        # those it knows while it loads, and loads strictly if the number of classes is that of its overlay.
        # A file without timm's head has another repository's, of as many classes as timm's weights have.
        has_head = len(body) < len(tensors)
        num_classes = cast(int, model.num_classes) if has_head else pretrained_cfg["num_classes"]
        overlay = {"state_dict": body | (head if has_head else {}), "num_classes": num_classes}
        overlay["label_offset"] = 0
        try:
            converted = _create(cfg, num_classes, 3, sizes, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # timm's converters raise anything on a file they do not know
            raise misfit from error
        body = {k: value for k, value in converted.state_dict().items() if not k.startswith(prefixes)}
    model.load_state_dict(body | head, strict=True)
