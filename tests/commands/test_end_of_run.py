"""What `finetune` says once a run has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from resode_cli.commands.end_of_run import tell_of_end
from resode_cli.commands.output import Output
from resode_cli.measuring.evaluate import Evaluation
from resode_cli.training.results import FinetuneResult
from resode_cli.training.settings import Settings


@pytest.mark.parametrize(
    "best_step, says",
    [
        (0, "no evaluation was better than before training"),
        (4, "best:   top-1 75.00% at step 4, which best.safetensors is"),
        (8, ""),
    ],
)
def test_the_best_model_is_named_where_it_is_not_the_last(
    best_step: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    one, other = (Evaluation(top1=top1, top5=1.0, loss=1.0, images=4) for top1 in (0.25, 0.5))
    result = FinetuneResult(8, 8, one, other, 0.75, 1.0, 1, False, 0, {}, best_step=best_step)
    tell_of_end(result, Path("run"), Settings(), Output(json_mode=False))
    said = "".join(capsys.readouterr())
    assert says in said and "after:  top-1 50.00%" in said
    assert ("best:" in said) == (best_step == 4)
