"""Charts are files that are whole or absent."""

import pytest
from PIL import Image

from pdae_fast.plots import chart


def test_a_chart_is_written_whole_or_not_at_all(tmp_path):
    with chart(tmp_path / "a.png", 2, 1) as axes:
        axes.plot([0, 1], [0, 1])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (300, 150)
    with pytest.raises(RuntimeError), chart(tmp_path / "b.png") as axes:
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
