"""How far logits are from labels: of one class an image, or of several."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def labels_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over a batch of the cross-entropy, for classes (B,); for labels of 0 and 1 (B, K) of the binary one.

    The binary cross-entropy of an image is the mean over the classes. logits: (B, K).
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
