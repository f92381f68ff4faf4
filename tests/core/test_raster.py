"""The order of slices, brute-forced on the CPU; kernels run the same C++."""

import itertools

from marlin import host


def test_every_place_once():
    for row_tiles, strips, group in itertools.product(range(1, 12), range(1, 9), range(1, 14)):
        places = host.raster(row_tiles, strips, group)
        assert sorted(places) == list(itertools.product(range(row_tiles), range(strips)))


def test_groups_of_rows_come_one_after_the_other():
    """Down a group's row tiles, then along the strips; the last group is what is left."""
    places = host.raster(5, 3, 2)
    rows = [row for row, _ in places]
    assert rows == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4, 4, 4]
    assert [strip for _, strip in places[:6]] == [0, 0, 1, 1, 2, 2]
