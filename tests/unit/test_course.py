"""What a pass needs with more rows and layers than were run, by hand numbers."""

import pytest

from hydra_rlhf.memory import course


def need(one: list[int], two: list[int], deep: range, *, kept: tuple[int, int] = (0, 0), per_layer=(0.0, 0.0)):
    """From the moments with one row and with two, of three layers."""
    a, b = (course.Course(kept=kept[i], per_layer=per_layer[i], moments=[one, two][i], deep=deep) for i in (0, 1))
    return course.Need.of(a, b, 3)


def test_a_line_goes_on_as_it_begins():
    assert [course.Line(10.0, 3.0).at(rows) for rows in (1, 2, 5)] == [10.0, 13.0, 22.0]


def test_the_peak_lies_elsewhere_with_more_rows():
    # 100 always, or 10 a row: with two rows still 100, with eleven 110.
    found = need([100, 10], [100, 20], range(0))
    assert [found.peak(rows, 3) for rows in (1, 2, 10, 11, 50)] == [100, 100, 100, 110, 500]


def test_more_layers_lift_the_deep_moments_alone():
    # The middle one is deep: 40 a row; a layer keeps 5 a row. The others are 30 and 60 a row.
    found = need([30, 40, 60], [60, 80, 120], range(1, 2), kept=(12, 24), per_layer=(5.0, 10.0))
    assert found.deep_peak(1, 3) == 40
    assert found.peak(1, 3) == 60
    assert found.peak(1, 7) == 60  # 40 + 4 x 5
    assert found.peak(1, 8) == 65
    assert found.peak(4, 8) == 260
    assert found.deep_peak(4, 2) == 140  # fewer layers than were run: 160 - 20
    assert found.kept(1, 3) == 12
    assert found.kept(4, 8) == 48 + 5 * 20


def test_a_pass_in_which_nothing_is_deep():
    found = need([7], [9], range(0), per_layer=(2.0, 2.0))
    assert found.peak(3, 3) == 11
    assert found.deep_peak(3, 3) == 0


def test_where_a_single_row_goes_another_way_the_highest_moments_are_compared():
    # Two and three moments: no telling which belong together. 50 and 80 at the most, and any of them may be deep.
    found = need([50, 20], [10, 80, 30], range(1), per_layer=(1.0, 1.0))
    assert found.peak(1, 3) == 50
    assert found.peak(3, 3) == 110
    assert found.peak(3, 13) == 120


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_lines_that_are_never_the_highest_are_left_out(rows: int):
    lines = [
        course.Line(*numbers) for numbers in ((5.0, 0.0), (3.0, 1.0), (4.0, 0.0), (1.0, 2.0), (3.0, 0.5), (3.0, 1.0))
    ]
    kept = course.highest_lines(lines)
    assert {(line.one_row, line.per_row) for line in kept} == {(5.0, 0.0), (3.0, 1.0), (1.0, 2.0)}
    assert len(kept) == 3
    assert max(line.at(rows) for line in kept) == max(line.at(rows) for line in lines)
