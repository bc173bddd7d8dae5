"""What a file may ask of timm: arguments of an architecture's function, by a list of those that only shape layers.

A model file and a saved network's config.json name such arguments. timm takes more than those: a checkpoint to read,
a configuration that names files and addresses, a folder to write to. Those are left to the user, who has options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision.transforms import InterpolationMode

from ..errors import ResodeError, first_few
from ..machine.memory import free_bytes

# Widths, depths, kinds of layers and rates, of timm's residual networks and of what else converts.
ALLOWED = frozenset(
    """
    aa_layer abs_win_pos_embed act_layer attn_drop_rate attn_layer attn_mlp_ratio avg_down base_dim base_width
    block_args block_reduce_first bottle_ratio bottleneck_width_ratio cardinality ch_div channel_multiplier
    channels class_token conv_bias conv_mlp conv_ratio depth depth_mult depths dims distilled down_kernel_size
    down_ops down_pad down_patch_size down_stride downsample downsample_block downsamples drop_block_rate
    drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim embed_dims embed_norm expand_ratio
    expansion_ratio fc_norm final_norm fix_stem focal_levels focal_windows fused_conv global_pool group groups
    growth_rate head_dim head_fn head_hidden_size head_init_scale head_norm_first heads img_size in_chans
    init_channels init_values inplanes input_3x3 kernel_size kernel_sizes layer_scale layer_scale_init_value
    layer_scale_init_values layers layerscale_value linear ls_init_value memory_efficient mlp_bias mlp_ratio
    mlp_ratios no_embed_class norm_eps norm_layer num_blocks num_classes num_features num_heads num_init_features
    num_reg_tokens num_stages output_stride pad_type patch_drop_rate patch_norm patch_size patch_stride pool_size
    pos_drop_rate pos_embed pre_norm preact proj_bias proj_drop_rate qk_norm qkv_bias ref_feat_shape reg_tokens
    rel_pos_type replace_stem_pool res_scale_init_values rope_temperature rope_type scale_attn_inner se_layer
    se_ratio sr_ratios standardize stem_bias stem_chs stem_norm stem_size stem_stride stem_type stem_width
    strict_img_size stride strides token_mixers use_fc_norm use_layer_scale use_pos_embed use_rel_pos use_rope
    weight_init width width_factor width_mult widths window_ratio window_size window_sizes window_spec
    zero_init_last
    """.split()
)
DEPTHS = ("depth", "depths", "layers", "num_blocks")
MOST_BLOCKS = 1_000  # of a network: its building takes time for each, whatever their size
MOST_CLASSES = 1_000_000
LARGEST = 65_536  # of any other number
LONGEST = 64  # items of a list, characters of a name
NAME = re.compile(rf"[A-Za-z0-9_.,+ -]{{0,{LONGEST}}}")


def check(arguments: object, architecture: str) -> dict[str, Any]:
    """The arguments, if all of them are on the list and plain. Raises ResodeError naming the first that is not."""
    if not isinstance(arguments, Mapping):
        raise ResodeError(f"the arguments of {architecture} are a {type(arguments).__name__}, not names with values")
    for name, value in arguments.items():
        if name not in ALLOWED:
            raise ResodeError(
                f"argument {str(name)[:LONGEST]!r} of {architecture} is not one that a file may set: only what shapes"
                " layers is (num_classes, in_chans, img_size, depths, act_layer, …); drop it from the file"
            )
        if name != "num_classes" and not _plain(value, levels=3, mapping=name == "block_args"):
            raise ResodeError(
                f"argument {name!r} of {architecture} is {_shown(value)}; a file may set numbers up to {LARGEST:,},"
                " names, true, false, and short lists of those"
            )
        if name in DEPTHS and (blocks := _total(value)) > MOST_BLOCKS:
            raise ResodeError(
                f"argument {name!r} of {architecture} asks for {blocks:,} blocks (at most {MOST_BLOCKS:,})"
            )
    for name, least, most in (("num_classes", 0, MOST_CLASSES), ("in_chans", 1, LARGEST)):
        value = arguments.get(name, least)
        if type(value) is not int or not least <= value <= most:
            raise ResodeError(
                f"argument {name!r} of {architecture} is {_shown(value)}, not a number from {least} to {most:,}"
            )
    return dict(arguments)


def build(name: str, create: Callable[[], nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """`create()`, which builds a network with arguments of a file. Raises ResodeError where timm cannot, or memory."""
    if not arguments:
        return create()
    try:
        with torch.device("meta"):
            needed = sum(p.numel() * p.element_size() for p in create().parameters())
    except Exception:  # some constructors look at values, which there are none of: what is wrong is said below
        needed = 0
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        asked = first_few([f"{k}={_shown(v)}" for k, v in arguments.items()])
        raise ResodeError(
            f"{name} with {asked} needs {needed / 2**30:.3g} GiB for its weights; {free / 2**30:.3g} are free"
        )
    try:
        return create()
    except Exception as error:  # of many kinds, by the layer that the values do not suit
        raise _unfit(name, arguments, error) from error


def _unfit(name: str, arguments: Mapping[str, Any], error: Exception) -> ResodeError:
    asked = first_few([f"{k}={_shown(v)}" for k, v in arguments.items()])
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ResodeError(f"timm cannot build {name} with {asked}: {type(error).__name__}: {reason}")


def _plain(value: object, *, levels: int, mapping: bool = False) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= LARGEST
    if isinstance(value, str):
        return NAME.fullmatch(value) is not None
    if levels and isinstance(value, (list, tuple)):
        return len(value) <= LONGEST and all(_plain(item, levels=levels - 1) for item in value)
    if levels and mapping and isinstance(value, Mapping):
        names = all(isinstance(key, str) and key.isidentifier() and key in _BLOCK_ARGUMENTS for key in value)
        return names and len(value) <= LONGEST and all(_plain(item, levels=levels - 1) for item in value.values())
    return False


_BLOCK_ARGUMENTS = ALLOWED | {
    "attn_kwargs",
    "rd_ratio",
    "rd_channels",
    "rd_divisor",
    "reduce_first",
    "dilation",
    "scale",
    "radix",
}


def _total(value: object) -> float:
    if isinstance(value, (list, tuple)):
        return sum(_total(item) for item in value)
    return value if isinstance(value, (int, float)) else 0


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def check_preprocessing(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a saved pretrained_cfg says of images and of the network's ends, and nothing of where weights are.

    Raises ResodeError for values that cannot be.
    """
    kept = {name: value for name, value in config.items() if name in _PREPROCESSING and value is not None}
    for name, value in kept.items():
        if not _PREPROCESSING[name](value):
            raise ResodeError(f"{where}: its {name} is {_shown(value)}, which cannot be")
    return kept


def _numbers(value: object, *, least: float, most: float) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (1, 3)
        and all(type(v) in (int, float) and math.isfinite(v) and least <= v <= most for v in value)
    )


def _is_size(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(type(v) is int and 1 <= v <= LARGEST for v in value)
    )


_PREPROCESSING: dict[str, Callable[[Any], bool]] = {
    "num_classes": lambda value: type(value) is int and 0 <= value <= MOST_CLASSES,
    "input_size": _is_size,
    "test_input_size": _is_size,
    "mean": lambda value: _numbers(value, least=-1000, most=1000),
    "std": lambda value: _numbers(value, least=1e-9, most=1000),
    "interpolation": lambda value: value in {mode.value for mode in InterpolationMode},
    "crop_pct": lambda value: type(value) in (int, float) and 0 < value <= 4,
    "crop_mode": lambda value: value in ("center", "squash", "border"),
    "fixed_input_size": lambda value: isinstance(value, bool),
    "classifier": lambda value: _plain(value, levels=1),
    "first_conv": lambda value: _plain(value, levels=1),
    "label_offset": lambda value: type(value) is int and 0 <= value <= MOST_CLASSES,
}
