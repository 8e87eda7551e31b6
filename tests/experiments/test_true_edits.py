"""Pairs of images that differ in one attribute: which they are, and edits compared with the truth."""

import pytest
import torch

from pdae_fast import Pipeline, UserError, metrics
from pdae_fast.experiments import true_edits


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model, steps=2, device="cpu", batch_size=8)


def test_region_and_error_in_it():
    truth = torch.zeros(2, 3, 8, 8)
    first = truth.clone()
    first[0, 1, 2:4, 2:6] = 1.0  # one channel of 8 pixels, 0.5 on [0, 1]
    first[1, 0, 0, 0] = 0.04
    region = true_edits.changed_region(first, truth)
    assert region.sum(dim=(1, 2)).tolist() == [8, 0] and bool(region[0, 2:4, 2:6].all())
    x = first.clone()
    x[0, :, 7, 7] = -1.0
    found = true_edits.compare_with(x, truth, region)
    assert float(found["mse_inside"][0]) == pytest.approx(0.25 / 3)
    assert float(found["mse_outside"][0]) == pytest.approx(0.25 / 56)
    assert bool(found["mse_inside"][1].isnan())
    torch.testing.assert_close(found["ssim"], metrics.ssim(x, truth))
    # Both parts together are the whole.
    whole = (8 * found["mse_inside"][0] + 56 * found["mse_outside"][0]) / 64
    assert float(whole) == pytest.approx(float(metrics.mse(x, truth)[0]))


def test_pairs_that_differ_in_one_attribute(tmp_path, pairs):
    folder = pairs(tmp_path / "pairs")
    edits = true_edits.find_edits(folder, ["dark", "unknown", "round"])
    assert edits == [("000000_a", "000000_b", "dark", 1), ("000001_a", "000001_b", "round", -1)]
    # With one of them alone the third pair differs in one attribute as well.
    assert [edit.first for edit in true_edits.find_edits(folder, ["dark"])] == ["000000_a", "000002_a"]
    with pytest.raises(UserError, match=r"round, dark\) are none of the classifier's \(blue"):
        true_edits.find_edits(folder, ["blue"])
    first, second = true_edits.load_pairs(folder, edits, (1, 32, 32))
    region = true_edits.changed_region(first, second)
    assert region[:, 4:12, 6:16].all() and int(region.sum()) == 2 * 80
    assert true_edits.pairs_folder("none", [str(tmp_path)]) is None
    assert true_edits.pairs_folder(None, [str(tmp_path)]) == folder
    assert true_edits.pairs_folder(None, [str(folder)]) is None
    with pytest.raises(UserError, match="no pairs.csv"):
        true_edits.pairs_folder(str(tmp_path), [])


def test_the_truth_by_single_calls(tmp_path, pipe, pairs):
    folder = pairs(tmp_path / "pairs")
    edits = true_edits.find_edits(folder, ["round", "dark"])
    first, second = true_edits.load_pairs(folder, edits, (1, 32, 32))
    truth = true_edits.against_truth(pipe, first, second, edits, [0.3, 0.6])
    assert [row["name"] for row in truth.rows] == ["no edit", "scale 0.3", "scale 0.6", "z of the true image"]
    region = true_edits.changed_region(first, second)
    one = torch.cat([pipe.manipulate(first[:1], "dark", 0.6), pipe.manipulate(first[1:], "round", -0.6)])
    z, z_second = pipe.encode(first), pipe.encode(second)
    x_T = pipe.invert(first, z)
    for row, x in ((0, pipe.decode(z, x_T)), (2, one), (3, pipe.decode(z_second, x_T))):
        expected = true_edits.compare_with(x, second, region)
        for key, values in expected.items():
            assert truth.rows[row][key] == pytest.approx(float(values.mean()), rel=1e-3), (row, key)
    assert truth.rows[0]["closer_inside"] == 0
    better = [p["scale 0.6"]["mse_inside"] < p["no edit"]["mse_inside"] for p in truth.per_pair]
    assert truth.rows[2]["closer_inside"] == sum(better) / 2
    assert truth.per_pair[1]["sign"] == -1 and truth.per_pair[1]["region"] == pytest.approx(80 / 1024)
