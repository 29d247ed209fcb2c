"""Mutants that change nothing that a test could see, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.mutants.sites import Mutant


@dataclass(frozen=True)
class Equivalent:
    """Mutants of one line, and why they are no mistakes.

    Attributes:
        path: The file.
        code: The line, or the part of it that tells it from all others.
        changes: ``before -> after`` of each mutant of this line that is meant.
        reason: Why no test can tell.
        nth: Which of several equal lines; None: all.
    """

    path: str
    code: str
    changes: tuple[str, ...]
    reason: str
    nth: int | None = None

    def covers(self, mutant: Mutant) -> bool:
        change = f"{mutant.before} -> {mutant.after}"
        return (
            mutant.path == self.path
            and self.code in mutant.code
            and change in self.changes
            and self.nth in (None, mutant.nth)
        )


_WORK = "Only a shortcut: without it the block computes what it then does not store."
_WIDE = "The other factor has 64 bits already, so the product has."
_FITS = "The value fits in 32 bits for every size that the op accepts; it is wide for its uses."

EQUIVALENTS: tuple[Equivalent, ...] = (
    # ---- sgmv_expand.cu
    Equivalent(
        "common/sgmv_expand.cuh",
        "if (largest == 0.0f || largest == infinity()) return 1.0f;",
        ("largest == 0.0f || largest == infinity() -> largest == infinity()",),
        "A row of zeros stays what it is times any power of two.",
    ),
    # ---- attention.cu
    Equivalent(
        "attention.cu",
        "num_keys = options.end_key(position_of(min(kBlockM,",
        ("min(kBlockM, num_rows - first_row) -> kBlockM",),
        "The last block of a sequence sees all its keys, and num_keys is no more than these.",
    ),
    Equivalent(
        "attention.cu",
        "q + static_cast<long long>(tile.begin + token_of(m)) * q_stride",
        ("long long -> int",),
        _WIDE,
    ),
    Equivalent(
        "attention.cu",
        "for (int n = threadIdx.x; n < kBlockN; n += kThreads) {",
        ("n += kThreads -> n += kThreads + 1",),
        "A block has at least kBlockN threads, so that the body runs at most once.",
    ),
    Equivalent(
        "attention.cu",
        "for (int t = first_tile; t < num_tiles; ++t) {",
        ("< -> <=",),
        "The keys of the tile after the last are all masked: nothing is added.",
    ),
    Equivalent(
        "attention.cu",
        "for (int i = 0; i < kHeadDim / 8; ++i) {",
        ("< -> <=",),
        "The next line goes on to the next i where d is beyond the head.",
        nth=1,
    ),
    Equivalent(
        "attention.cu",
        "const long long capacity = min(",
        (
            "min(static_cast<long long>(max_pages) * page_size, kMaxKeys) -> "
            "static_cast<long long>(max_pages) * page_size",
        ),
        "Another result needs more than 2**30 keys in one sequence: hours on any machine.",
    ),
    # ---- rope.cu, kv_cache.cu
    Equivalent("kv_cache.cu", "long long row = 0;", ("long long -> int",), _WIDE),
    Equivalent(
        "kv_cache.cu",
        "if (target.row >= rows || sequence == batch_size || token < row_offsets[sequence]) return target;",
        ("sequence == batch_size || token < row_offsets[sequence] -> sequence == batch_size",),
        "token is at least row_offsets[0], and segment_of returns no later sequence that starts after it.",
    ),
    # ---- headers
    *(
        Equivalent(
            "common/mma.cuh",
            code,
            ("<= -> <",),
            "Equal only where T rounds the value to 0: then it rounds the rest, the same number, to 0 too.",
        )
        for code in ("fabsf(low_left) <= fabsf(low)", "fabsf(high_left) <= fabsf(high)")
    ),
    Equivalent(
        "common/ragged.cuh",
        "if (blockIdx.x != 0 || blockIdx.y != 0) return;",
        (
            "blockIdx.x != 0 || blockIdx.y != 0 -> false",
            "blockIdx.x != 0 || blockIdx.y != 0 -> blockIdx.y != 0",
            "blockIdx.x != 0 || blockIdx.y != 0 -> blockIdx.x != 0",
        ),
        "Only a shortcut: more blocks report the same.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "__device__ Tile tile_of(long long item,",
        ("long long -> int",),
        "The item is a blockIdx.x, which is below 2**31.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "tile.begin = min(max(offsets[tile.segment], 0), total);",
        ("min(max(offsets[tile.segment], 0), total) -> max(offsets[tile.segment], 0)",),
        "A segment that begins past the last row ends at it, and has no rows either way.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "tile.end = tile.segment == count ? total : min(",
        ("max(offsets[tile.segment + 1], tile.begin) -> offsets[tile.segment + 1]",),
        "An end before the beginning leaves no rows, as an end at the beginning does.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "const long long row = (item - start(tile.segment)) * kTile;",
        ("long long -> int",),
        "Good offsets give rows below total * units + kTile. With bad ones results are undefined, and the "
        "comparisons that follow keep any row within its segment.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "const bool possible = row >= 0 && row < static_cast<long long>(total) * units;",
        ("long long -> int",),
        _FITS + " total * units is below 2**31.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "const bool possible = row >= 0 && row < static_cast<long long>(total) * units;",
        ("< -> <=",),
        "A tile that starts at the last row's end has no rows, and is left as an impossible one is.",
    ),
    Equivalent(
        "common/ragged.cuh",
        "return last_start_before(count + 1, row, [&](int s) { return static_cast<long long>(",
        ("long long -> int",),
        _WIDE + " Here it is the other side of a comparison.",
    ),
    Equivalent(
        "common/softmax.cuh",
        "return total == 0.0f ? -infinity()",
        ("total == 0.0f -> false",),
        "A total of 0 comes with a largest score of -inf, and the logarithm of 0 is -inf.",
    ),
)


def reason_of(mutant: Mutant) -> str:
    """Why a mutant is equivalent; an empty string when it is not known to be."""
    return next((each.reason for each in EQUIVALENTS if each.covers(mutant)), "")


def stale(mutants: Iterable[Mutant]) -> list[Equivalent]:
    """Entries that no mutant matches: their code is gone."""
    everything = list(mutants)
    return [each for each in EQUIVALENTS if not any(map(each.covers, everything))]
