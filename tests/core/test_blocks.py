"""The sum of blocks over growing rows, against adding them up."""

from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.blocks import GrowingBlocks

rows = st.lists(st.tuples(st.integers(1, 200), st.integers(-300, 300), st.integers(1, 4)), max_size=8)


@given(rows, rows, st.integers(1, 40), st.integers(0, 500))
def test_equals_the_sum_over_rows(stay, leave, block, later):
    growing = GrowingBlocks(block)
    for held in [*stay, *leave]:
        growing.add(*held)
    for held in leave:
        growing.remove(*held)
    iteration = 300 + later
    expected = sum(-(-(tokens + iteration - start) // block) * width for tokens, start, width in stay)
    assert growing.at(iteration) == expected
    assert growing.sequences == sum(width for _, _, width in stay)
