"""Random weights of one decoder block and of its adapters, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.testing import ModelShape

# (rank, alpha) of the adapter in each slot. alpha / rank is a power of two, so that folding it into
# B rounds nothing and merged weights are exactly W + scaling * B A.
RANKS_AND_ALPHAS = ((8, 16.0), (24, 12.0), (64, 16.0))


def projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``(in_dim, out_dim)`` of the seven dense layers of a block, by name."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    return {
        "q": (hidden, shape.q_dim),
        "k": (hidden, shape.kv_dim),
        "v": (hidden, shape.kv_dim),
        "o": (shape.q_dim, hidden),
        "gate": (hidden, wide),
        "up": (hidden, wide),
        "down": (wide, hidden),
    }


@dataclass(frozen=True)
class Adapter:
    """One adapter as a checkpoint has it: unscaled factors."""

    rank: int
    alpha: float
    a: dict[str, NDArray[Any]]
    """Projection -> ``[rank, in_dim]``."""
    b: dict[str, NDArray[Any]]
    """Projection -> ``[out_dim, rank]``."""

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class BlockWeights:
    """The weights that layers and oracles are both made from."""

    shape: ModelShape
    dtype: np.dtype[Any]
    base: dict[str, NDArray[Any]]
    """Projection -> ``[out_dim, in_dim]``."""
    adapters: tuple[Adapter, ...]
    """By slot."""

    @property
    def max_rank(self) -> int:
        """Largest rank of the adapters."""
        return max(adapter.rank for adapter in self.adapters)


def random_weights(
    shape: ModelShape, dtype: np.dtype[Any], rng: np.random.Generator
) -> BlockWeights:
    """Normal weights: of normal inputs a base product has size 1, an adapter's delta size 1/2."""

    def normal(rows: int, cols: int, size: float) -> NDArray[Any]:
        values = rng.standard_normal((rows, cols), np.float32)
        values *= np.float32(size)
        return values.astype(dtype, copy=False)

    sizes = projections(shape)
    base = {name: normal(n, k, k**-0.5) for name, (k, n) in sizes.items()}
    adapters = [
        Adapter(
            rank,
            alpha,
            {name: normal(rank, k, k**-0.5) for name, (k, _) in sizes.items()},
            {name: normal(n, rank, rank**0.5 / (2 * alpha)) for name, (_, n) in sizes.items()},
        )
        for rank, alpha in RANKS_AND_ALPHAS
    ]
    return BlockWeights(shape, dtype, base, tuple(adapters))
