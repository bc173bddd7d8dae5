"""A log that cannot be read costs no run: it is set aside, and the run goes on."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from resode_cli.errors import ResodeWarning
from resode_cli.training.run_log import Log

HEADER = "split,step,epoch,loss,top1,lr,images_per_second,peak_bytes\n"
DAMAGED = {
    "binary": b"\xff\xfe\x00\x01" * 20,
    "latin": HEADER.encode() + "train,1,1,é,,,,\n".encode("latin-1"),
    "a number of 5,000 digits": HEADER.encode() + b"train," + b"1" * 5000 + b",1,1,1,1,1,1\n",
    "a field past all bounds": HEADER.encode() + b"train,1,1," + b"x" * 200_000 + b",1,1,1,1\n",
    "other columns": b"step\n1\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_log_is_set_aside(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(DAMAGED[kind])
    with pytest.warns(ResodeWarning, match="cannot be read .*; it is log.csv.damaged now"):
        Log(path, ["layer1"], keep_up_to=5)
    assert (tmp_path / "log.csv.damaged").read_bytes() == DAMAGED[kind]
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == []


def test_half_a_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    Log(path, ["layer1"], keep_up_to=0)
    rows = ["train,1,1,0.5,0.1,0.1,10,1000,,,", "train,9,1,0.5,0.1,0.1,10,1000,,,", "train,2,1,0."]
    path.write_text(path.read_text() + "\n".join(rows))
    Log(path, ["layer1"], keep_up_to=5)
    with path.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1"]
