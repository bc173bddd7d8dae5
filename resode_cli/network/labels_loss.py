"""What logits say of labels, and how far they are from them: of one class an image, or of several."""

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


def same_labels(one: Tensor, other: Tensor, *, several: bool) -> Tensor:
    """For which images two networks predict the same class, or the same set of labels, (B,) bool.

    one, other: logits (B, K). several: whether an image may have any number of labels, which
    are given from a probability of 0.5 on.
    """
    return ((one >= 0) == (other >= 0)).all(1) if several else one.argmax(1) == other.argmax(1)
