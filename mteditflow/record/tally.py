"""Figures over the rows of all microbatches and ranks: sums and counts are added up, and a mean is formed last.

A mean of means would depend on how many rows a microbatch had, and with it on the number of ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mteditflow.distributed import Ranks


class Tally:
    """Means, and largest values, of named figures."""

    def __init__(self, means: Sequence[str], worst: Sequence[str]) -> None:
        self._means: dict[str, list[Tensor]] = {name: [] for name in means}
        self._worst: dict[str, list[Tensor]] = {name: [] for name in worst}
        self._count = 0.0

    def add(self, values: dict[str, Tensor], count: float) -> None:
        """Count figures, 0-d: means over `count` rows, or the largest of them; of no rows, nothing."""
        if count:
            self._count += count
            for name, value in values.items():
                if name in self._worst:
                    self._worst[name].append(value)
                else:
                    self._means[name].append(value.double() * count)

    def keep_largest(self, name: str, kept: str, ranks: Ranks) -> float:
        """The largest of a figure so far, of all ranks, kept as another figure; NaN where there was none."""
        largest = self._largest([name], ranks)[name]
        self._worst[kept] = [torch.tensor(largest)]
        return largest

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The figures of all ranks by name, NaN where no row was counted, and num_transitions, how many were."""
        sums = [torch.stack(values).sum() if values else torch.tensor(0.0) for values in self._means.values()]
        total = torch.stack([value.double().to(ranks.device) for value in (torch.tensor(self._count), *sums)])
        ranks.sum_([total])
        count, *sums = total.tolist()
        means = {name: value / count if count else math.nan for name, value in zip(self._means, sums, strict=True)}
        return means | self._largest(list(self._worst), ranks) | {"num_transitions": count}

    def _largest(self, names: list[str], ranks: Ranks) -> dict[str, float]:
        if not names:
            return {}
        none = torch.tensor(-math.inf)
        found = [torch.stack(self._worst[name]).max() if self._worst[name] else none for name in names]
        largest = torch.stack([value.double().to(ranks.device) for value in found])
        ranks.max_(largest)
        return dict(zip(names, largest.masked_fill(largest == -math.inf, math.nan).tolist(), strict=True))
