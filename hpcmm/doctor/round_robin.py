"""Which nodes measure their link together, so that each meets several others and no slow link hides a good one."""

from __future__ import annotations

_MOST_ROUNDS = 3


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Up to three rounds in which each of ``count`` members has another partner; with an odd count one rests.

    The circle method of round-robin tournaments: one place is fixed, the others turn.
    """
    if count < 2:
        return []
    places = count + count % 2
    turning = list(range(1, places))
    rounds = []
    for turn in range(min(places - 1, _MOST_ROUNDS)):
        circle = [0, *turning[turn:], *turning[:turn]]
        pairs = [(circle[at], circle[places - 1 - at]) for at in range(places // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
    return rounds


def best_of_each(count: int, measured: list[tuple[int, int, float]]) -> list[float | None]:
    """Each member's fastest pair: a bad node is slow with every partner, a good one only with a bad one."""
    best: list[float | None] = [None] * count
    for first, second, rate in measured:
        for member in (first, second):
            known = best[member]
            best[member] = rate if known is None else max(known, rate)
    return best
