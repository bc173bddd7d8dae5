"""Whether a network runs on images of another size than it was made for."""

from __future__ import annotations

import torch

from ..errors import ResodeError
from ..network.model import OdeResNet
from ..network.parts import Preprocessing
from ..network.repeat import in_eval_mode, repeatable
from ..surgery.convert import like, random_batch


def check_runs_on(model: OdeResNet, preprocessing: Preprocessing) -> None:
    """Run it on one image of noise in eval mode. Raises ResodeError, with its own reason, where it cannot."""
    image = like(random_batch(preprocessing, 1), model)
    try:
        with in_eval_mode(model), torch.no_grad():
            found = tuple(repeatable(lambda: model(image)).shape)
    except (ResodeError, MemoryError):
        raise
    except Exception as error:  # of many kinds: each network has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResodeError(f"the network cannot run on images of {preprocessing.size_text}: {reason}") from error
    if found != (1, model.info.num_classes):
        raise ResodeError(
            f"the network cannot run on images of {preprocessing.size_text}: it gives {found} in place of logits"
        )
