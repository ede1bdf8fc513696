"""The assignment problem: pair rows with columns at the least total cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def cheapest_assignment(costs: Sequence[Sequence[float]]) -> list[int]:
    """Give the column of each row of a square matrix such that the sum of their costs is least.

    Shortest augmenting paths with potentials (Kuhn 1955; Jonker & Volgenant 1987), O(n^3): rows
    join one by one, each along the cheapest path that frees a column for it.
    """
    size = len(costs)
    of_row, of_column = [0.0] * size, [0.0] * size
    # One column more than there are stands for the row that joins.
    row_at = [-1] * (size + 1)
    for row in range(size):
        row_at[size] = row
        column = size
        distance = [math.inf] * size
        before = [size] * size
        visited: list[int] = []
        while row_at[column] >= 0:
            visited.append(column)
            here = row_at[column]
            free = [j for j in range(size) if j not in visited]
            for j in free:
                reduced = costs[here][j] - of_row[here] - of_column[j]
                if reduced < distance[j]:
                    distance[j], before[j] = reduced, column
            column = min(free, key=distance.__getitem__)
            step = distance[column]
            for j in visited:
                of_row[row_at[j]] += step
                if j < size:
                    of_column[j] -= step
            for j in free:
                distance[j] -= step
        while column != size:
            row_at[column] = row_at[before[column]]
            column = before[column]
    return [row_at.index(row) for row in range(size)]
