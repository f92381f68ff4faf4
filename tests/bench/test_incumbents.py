"""The comparison data: read whole, compared like with like."""

from bench.incumbents import incumbents_on, read_anchors


def test_anchors_are_complete():
    anchors = read_anchors()
    assert len(anchors.us) == 96 and len(anchors.shapes()) == 12
    assert anchors.shapes()[0] == (4096, 4096)
    assert anchors.rows((8192, 8192))[-1] == 8192
    assert all("cublas_fp16" in kernels for kernels in anchors.us.values())


def test_like_is_compared_with_like():
    cell = (16384, 16896, 1)
    anchors = read_anchors()
    assert anchors.best(cell, 128) == ("humming", 43.783)  # not 2:4, not per column
    assert anchors.best(cell, -1) == ("marlin_published_percolumn", 43.69)
    assert anchors.published_us(cell, 128) == 49.145  # the better of its two tiles
    assert anchors.published_us(cell, -1) == 43.69
    assert anchors.best(cell, 64) is None and anchors.published_us(cell, 64) is None
    assert anchors.best((1, 2, 3), 128) is None


def test_only_the_card_that_was_measured_is_compared():
    assert incumbents_on("NVIDIA H200").us
    assert not incumbents_on("NVIDIA H100 80GB HBM3").us
