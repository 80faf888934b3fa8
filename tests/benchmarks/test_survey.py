"""Which weights have data: the survey's rows and its page."""

from __future__ import annotations

import pytest

from tests.benchmarks.survey import Survey, survey, table


@pytest.mark.parametrize("arch", ["test_nfnet", "test_efficientnet", "test_vit"])
def test_networks_of_every_sort_of_layer_have_data_for_every_weight(arch: str) -> None:
    row = survey("timm", arch)
    assert row["weights"] > 100_000
    assert row["without"] == {}


def test_weights_without_data_are_counted_by_their_reason() -> None:
    """The position network of each block runs over a table of distances: there are no images in it."""
    row = Survey("timm", "test_vit_relpos", "vision_transformer_relpos", 850_147, **survey("timm", "test_vit_relpos"))
    assert row.without == {"its input does not come image by image along the first axis": 5760}
    assert row.share == 5760 / row.weights
    failure = Survey("timm", "other", "other", 2_000_000, failure="needs | more")
    many = Survey("pytorchcv", "many", "many", 100, weights=100, without={"odd": 60, "even": 20})
    whole = Survey("pytorchcv", "whole", "whole", 100, weights=100)
    page = table([whole, failure, many, row])
    assert "4 architectures: 3 ran; in 1 every weight has data, in 1 more all but 1%, in 1 not." in page
    assert "| pytorchcv/many | 0.00 | 80.00% | even (20.0%); odd (60.0%) |" in page
    assert "| timm/other | 2.00 | needs \\| more |" in page
    assert "| pytorchcv/whole | 0.00 | 0.00% |  |" in page
