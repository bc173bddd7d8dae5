import pytest

from resode_cli.quantities import counted, duration, number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (61, "61 s"),
        (89.9, "90 s"),
        (119.7, "2 min 00 s"),  # never 1 min 60 s
        (605, "10 min 05 s"),
        (5400, "1.5 h"),
    ],
)
def test_a_duration_rounds_as_a_whole(seconds, text):
    assert duration(seconds) == text


def test_figures_are_written_as_people_write_them():
    assert counted(1, "image") == "1 image"
    assert counted(5000, "image") == "5,000 images"
    assert number(float("nan")) == "not finite"
    assert number(None) == "–"
    assert number(0.01234) == "0.012"
