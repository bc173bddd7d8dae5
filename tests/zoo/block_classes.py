"""One small architecture for every class of residual block in timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torchvision
from timm.models import byobnet, cspnet, senet
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """steps: of each stage. size: of its images. random: arguments of its random layers.

    short: arguments for fewer blocks than the library's, where those are many of one class, or for smaller images.
    """

    name: str
    steps: tuple[int, ...]
    size: int = 64
    random: dict[str, float] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    short: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.arguments.values())])

    def build(self, **arguments: Any) -> nn.Module:
        """The network with random weights, its last norms at zero where that is its default."""
        library, _, name = self.name.partition(":")
        torch.manual_seed(0)
        make: Callable[..., nn.Module] = torchvision.models.get_model if library == "torchvision" else timm.create_model
        if name == "legacy_senet154":  # with fewer blocks than its 50, which would take a minute
            return senet.SENet(senet.SEBottleneck, (1, 3, 1, 1), 64, 16, inplanes=128, input_3x3=True, num_classes=10)
        return make(name, num_classes=10, **self.arguments, **self.short, **arguments)


def cross_stages(name: str, depths: tuple[int, ...]) -> dict[str, Any]:
    """So many blocks in the stages of a cross-stage partial network."""
    return {"stages": replace(cspnet.model_cfgs[name].stages, depth=depths)}


def few_blocks(name: str) -> dict[str, Any]:
    """At most two blocks in each stage of a network that timm lists by its blocks."""
    return {"blocks": tuple(replace(stage, d=min(stage.d, 2)) for stage in byobnet.model_cfgs[name].blocks)}


LAYERS = {"layers": (3, 2, 2, 2)}
DROP = {"drop_path_rate": 0.3}
DROP_BLOCK = {"drop_path_rate": 0.3, "drop_block_rate": 0.1}
CORE = [
    Architecture("timm:resnet18", (2, 1, 1, 1), random=DROP_BLOCK),
    Architecture("timm:resnet26t", (1, 1, 1, 1), random=DROP_BLOCK),
    *(
        Architecture("timm:resnet18", (2, 1, 1, 1), arguments={"act_layer": act})
        for act in ("silu", "gelu", "gelu_tanh", "hard_swish", "leaky_relu", "mish")
    ),
    Architecture("timm:res2net50_14w_8s", (2, 1, 1, 1), random=DROP, short=LAYERS),
    Architecture("timm:resnest26d", (1, 1, 1, 1), random=DROP),
    Architecture("timm:skresnet18", (2, 1, 1, 1), random=DROP),
    Architecture("timm:skresnet50", (2, 1, 1, 1), random=DROP, short=LAYERS),
    Architecture("timm:resnetv2_18", (2, 1, 1, 1), random=DROP),
    Architecture("timm:resnetv2_50", (2, 1, 1, 1), random=DROP, short=LAYERS),
    Architecture("timm:resnetv2_50x1_bit", (2, 3, 5, 2), random=DROP),
    Architecture("timm:legacy_seresnet18", (2, 1, 1, 1)),
    Architecture("timm:legacy_seresnet50", (2, 3, 5, 2)),
    Architecture("timm:legacy_seresnext26_32x4d", (1, 1, 1, 1)),
    Architecture("timm:legacy_senet154", (0, 2, 0, 0)),
    Architecture("timm:regnetx_002", (0, 0, 3, 6), random=DROP),
    Architecture("timm:regnety_002", (0, 0, 3, 6), random=DROP),
    Architecture("timm:regnety_040_sgn", (0, 1, 3, 1), random=DROP, short={"depth": 9, "wa": 90.0}),
    Architecture("timm:regnetz_005", (0, 3, 8, 6), random=DROP),
    Architecture("timm:gernet_s", (0, 1, 1, 1, 0), random=DROP, short=few_blocks("gernet_s")),
    Architecture("timm:resnet32ts", (1, 2, 2, 1), random=DROP),
    Architecture("timm:gcresnext26ts", (1, 1, 1, 1), random=DROP),
    Architecture("timm:bat_resnext26ts", (1, 1, 1, 1), size=256),
    Architecture("timm:regnetz_b16", (1, 1, 1, 1), random=DROP, short=few_blocks("regnetz_b16")),
    Architecture("timm:regnetz_b16_evos", (1, 1, 1, 1), random=DROP, short=few_blocks("regnetz_b16_evos")),
    Architecture("timm:resnet50_clip", (1, 1, 1, 1), random=DROP, short=few_blocks("resnet50_clip")),
    Architecture("timm:botnet26t_256", (1, 1, 1, 1), size=128, short={"img_size": 128}),
    Architecture("timm:halonet26t", (1, 1, 1, 1), size=256),
    Architecture("timm:lambda_resnet26t", (1, 1, 1, 1), random=DROP),
    Architecture("timm:tresnet_m", (2, 1, 2, 1), random=DROP, short={"layers": (2, 2, 3, 2)}),
    Architecture("timm:nf_regnet_b0", (0, 2, 1, 1), random=DROP, short={"depths": (1, 3, 2, 2)}),
    Architecture("timm:nf_ecaresnet26", (1, 1, 1, 1), random=DROP),
    Architecture("timm:eca_nfnet_l0", (0, 1, 2, 1), random=DROP, short={"depths": (1, 2, 3, 2)}),
    Architecture("torchvision:resnet18", (2, 1, 1, 1)),
    Architecture("torchvision:resnet50", (2, 3, 5, 2)),
    Architecture("torchvision:regnet_x_400mf", (0, 1, 6, 11)),
    Architecture("torchvision:regnet_y_400mf", (0, 2, 5, 5)),
]
LONG = ("timm:bat_resnext26ts", "timm:botnet26t_256", "timm:halonet26t")
OTHERS = [
    Architecture("timm:hrnet_w18_small", (2,) * 9),
    Architecture("timm:cspresnet50", (2, 2, 3, 2), random=DROP, short=cross_stages("cspresnet50", (2, 2, 3, 2))),
    Architecture("timm:darknet17", (1, 1, 1, 1, 1), random=DROP),
    Architecture("timm:cs3darknet_s", (1, 3, 4, 1), random=DROP),
    Architecture("timm:cs3edgenet_x", (1, 2, 3, 2), random=DROP, short=cross_stages("cs3edgenet_x", (1, 2, 3, 2))),
    Architecture("timm:legacy_xception", (8,)),
    Architecture("timm:xception41", (8,), random=DROP),
    Architecture("timm:inception_resnet_v2", (10, 20, 9, 1), size=96),
    Architecture("timm:ese_vovnet39b", (0, 0, 1, 1), random=DROP),
    Architecture("timm:hgnet_tiny", (0, 0, 1, 0), random=DROP),
    Architecture("timm:mobilevit_xxs", (1, 2, 2, 4, 3)),
    Architecture("timm:vit_tiny_r_s16_p8_224", (4,), short={"img_size": 64, "depth": 4}),
    Architecture("timm:convnext_atto", (2, 2, 6, 2), random=DROP),
    Architecture("timm:vit_tiny_patch16_224", (4,), random=DROP, short={"img_size": 64, "depth": 4}),
    Architecture("timm:fastvit_t8", (2, 2, 4, 2), random=DROP),
    Architecture("timm:eva02_tiny_patch14_224", (4,), size=56, short={"img_size": 56, "depth": 4}),
]
