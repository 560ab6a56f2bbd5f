"""Memory plans: never overlapping, close to the lower bound."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.codegen.memory import Lifetime, align, peak_live, plan
from edgepipe.codegen.plan import ALIGNMENT

TENSORS = st.lists(
    st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(1, 5000),
        st.integers(0, 20),
        st.integers(0, 6),
    ),
    max_size=30,
)


def overlaps(a: Lifetime, b: Lifetime) -> bool:
    return a.first <= b.last and b.first <= a.last


def check(tensors: list[Lifetime], offsets: list[int], total: int) -> None:
    for i, a in enumerate(tensors):
        assert offsets[i] % ALIGNMENT == 0
        assert offsets[i] + a.size <= total
        for j in range(i):
            b = tensors[j]
            if overlaps(a, b):
                apart = offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
                assert apart, (a, b)


@given(TENSORS)
@settings(max_examples=200, deadline=None)
def test_live_tensors_never_overlap(tensors: list[Lifetime]) -> None:
    offsets, total = plan(tensors)
    check(tensors, offsets, total)
    assert total >= peak_live(tensors)


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    chain = [Lifetime(size, i, i + 1) for i, size in enumerate([6400, 1280, 12800, 640, 6400])]
    _, total = plan(chain)
    assert total == peak_live(chain) == 12800 + 1280


def test_peak_counts_alignment() -> None:
    assert peak_live([Lifetime(1, 0, 0), Lifetime(65, 0, 0)]) == align(1) + align(65) == 192


def test_no_tensors() -> None:
    assert plan([]) == ([], 0)
