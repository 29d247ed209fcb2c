"""The listed cases of the segmented LoRA products, and one of them laid out on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorakit import tiles
from lorakit.dtypes import STORAGE, bfloat16
from lorakit.testing import activations, adapters, row_offsets, widen
from lorakit.tiles import Instance
from tests.ops.helpers import FLOAT16, FLOAT32, shifted

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

BF16, FP16 = (bfloat16,), (FLOAT16,)
HALVES = BF16 + FP16
SHARED_BYTES = 227 * 1024  # of a block on sm_90 and on the emulator


@dataclass(frozen=True)
class SgmvCase:
    """Groups of rows, the sizes of the adapters, and how each array lies in memory."""

    name: str
    groups: tuple[tuple[int, int], ...]
    """(slot, rows) of each group."""
    in_dim: int = 64
    out_dim: int = 136
    rank: int = 16
    """The rank that adapters are stored at; true ranks are mixed below it."""
    ranks: tuple[int, ...] | None = None
    """True rank of each of the slots."""
    slots: int = 4
    trailing: int = 0
    """Rows past the last offset."""
    a: str = "plain"
    """`plain`, `shifted` (starts off a 16-byte boundary) or `transposed` (in_dim is not the last axis)."""
    b: str = "rank_major"
    """`rank_major`, `shifted` (the same, off a boundary) or `plain` (``[slots, out_dim, rank]``)."""
    y: str = "new"
    """`new`, or added to: `plain`, `wide` (slice of a wider array), `shifted` (the same, off a boundary)."""
    y_float32: bool = False
    bias: bool = False
    ranks_from: str = "both"
    """Where true ranks are said: `slots`, `groups`, `both` (either may be smaller) or `neither`."""
    metadata: Any = np.uint32
    host_metadata: bool = False
    dtypes: tuple[Any, ...] = STORAGE
    dtype: Any = field(default=None, kw_only=True)
    gpu_only: bool = False

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.groups) + self.trailing

    @property
    def y_dtype(self) -> Any:
        return FLOAT32 if self.y_float32 else self.dtype

    @property
    def item_rows(self) -> int:
        """Rows of a work item."""
        return tiles.sgmv_item_rows(self.rows, min(len(self.groups), self.slots))

    @property
    def max_items(self) -> int:
        """Each slot's, and each group's of a rank of its own, last item may not be full."""
        bounds = len(self.groups) if self.ranks_from in ("groups", "both") else 0
        return self.rows // self.item_rows + min(self.rows, len(self.groups), self.slots + bounds)

    def route_instances(self) -> set[Instance]:
        if not (self.rows and self.groups):
            return set()
        rows = {tiles.sgmv_route_rows()} if self.rows > 1024 else set()
        return {tiles.sgmv_route_items()} | rows

    def shrink_instances(self) -> set[Instance]:
        if not (self.rows and self.groups):
            return set()
        aligned = self.in_dim * self.dtype.itemsize % 16 == 0 and self.a == "plain"
        blocks = -(-self.rank // 16)
        few = tiles.sgmv_is_few(self.max_items, blocks, -(-self.in_dim // 1024))
        shrink = tiles.sgmv_shrink(self.dtype, blocks, self.item_rows, aligned, few)
        return self.route_instances() | {shrink}

    def expand_instances(self, shared_bytes: int = SHARED_BYTES) -> set[Instance]:
        """Of `sgmv_expand` by itself, whose h has rows of just the rank."""
        return self._expand_instances(self.rank % 4 == 0, shared_bytes)

    def _expand_instances(self, h_aligned: bool, shared_bytes: int) -> set[Instance]:
        if not (self.rows and self.groups):
            return set()
        aligned = self.out_dim % 8 == 0 and self.b == "rank_major" and self.y != "shifted"
        dtypes = self.dtype, self.y_dtype
        aligned = aligned and h_aligned
        expand = tiles.sgmv_expand(*dtypes, self.rank, self.item_rows, aligned, shared_bytes)
        return self.route_instances() | {expand}

    def lora_instances(self, shared_bytes: int = SHARED_BYTES) -> set[Instance]:
        return self.shrink_instances() | self._expand_instances(True, shared_bytes)


MIXED = ((0, 3), (2, 17), (-1, 2), (1, 4), (3, 1))
LONG = ((2, 1054), (-1, 1), (0, 993))  # items of 64 rows
LONGER = ((2, 2054), (-1, 1), (0, 2093))  # of 128

CASES = (
    # First, so that sanitizers run it: two blocks of ranks, and a loop over ranks of more than one stage.
    SgmvCase("rank_100", MIXED, rank=100, ranks=(100, 96, 97, 3), dtypes=FP16),
    SgmvCase("one_row", ((1, 1),)),
    # The shapes of MAX's own tests.
    SgmvCase("max_single", ((0, 16),), in_dim=128, out_dim=64, slots=1, dtypes=BF16),
    SgmvCase("max_repeated", ((0, 8), (0, 12), (0, 10)), in_dim=128, slots=1, dtypes=BF16),
    SgmvCase("max_four", ((0, 80), (1, 120), (2, 100), (3, 140)), out_dim=64, dtypes=BF16),
    SgmvCase(
        "max_one_and_base",
        ((0, 18), (0, 10), (0, 12), (-1, 8), (-1, 10), (-1, 12)),
        in_dim=256,
        out_dim=256,
        dtypes=BF16,
    ),
    SgmvCase(
        "max_three_and_base", ((0, 18), (1, 10), (2, 12), (1, 14), (-1, 8), (-1, 10)), dtypes=BF16
    ),
    # Groups and tiles of 16 rows.
    SgmvCase("tile_less_one", ((2, 15),), dtypes=FP16),
    SgmvCase("tile_plus_one", ((2, 17),)),
    SgmvCase("two_tiles", ((1, 5), (2, 32)), dtypes=FP16),
    SgmvCase("empty_groups", ((0, 0), (1, 5), (2, 0), (-1, 0), (0, 3), (3, 0))),
    SgmvCase("all_base", ((-1, 5), (-7, 3))),
    SgmvCase("many_groups", tuple((i % 5 - 1, 1 + i % 2) for i in range(40)), dtypes=BF16),
    SgmvCase("rows_past_the_last_offset", ((1, 4), (2, 3)), trailing=18),
    SgmvCase("zero_groups", (), trailing=3, dtypes=BF16),
    SgmvCase("zero_rows", ((0, 0), (-1, 0)), dtypes=BF16),
    # Ranks: blocks of 16 and of 64.
    SgmvCase("rank_1", MIXED, rank=1),
    SgmvCase("rank_3", MIXED, rank=3, dtypes=FP16),
    SgmvCase("rank_8", MIXED, rank=8, dtypes=BF16),
    SgmvCase("rank_17", MIXED, rank=17, ranks=(17, 1, 16, 9)),
    SgmvCase("rank_64", MIXED, rank=64, ranks=(64, 8, 33, 1), dtypes=BF16),
    SgmvCase("rank_65", MIXED, rank=65, ranks=(65, 16, 64, 1)),
    SgmvCase("rank_zero", MIXED, ranks=(0, 16, 0, 5), bias=True, y="plain", dtypes=BF16),
    SgmvCase("ranks_of_slots", MIXED, ranks_from="slots", dtypes=BF16),
    SgmvCase("ranks_of_groups", MIXED, ranks_from="groups", metadata=np.int32, dtypes=FP16),
    SgmvCase("ranks_unknown", MIXED, ranks_from="neither", dtypes=BF16),
    SgmvCase("host_metadata", MIXED, host_metadata=True, dtypes=BF16),
    # Sizes that are no multiple of a tile, of a vector, of anything.
    SgmvCase("k7_n5", MIXED, in_dim=7, out_dim=5),
    SgmvCase("k8_n8", MIXED, in_dim=8, out_dim=8),
    SgmvCase("k130_n129", MIXED, in_dim=130, out_dim=129, rank=17, dtypes=FP16),
    SgmvCase("k200_n264", MIXED, in_dim=200, out_dim=264, rank=17, dtypes=BF16),
    SgmvCase("k1001_n257", ((1, 3),), in_dim=1001, out_dim=257, rank=17, dtypes=BF16),
    # Sums in parts of 1024, and more rows than a decode batch has.
    SgmvCase("three_parts", ((1, 2), (2, 1)), in_dim=4400, rank=40, dtypes=BF16),
    SgmvCase("prefill", ((0, 70), (-1, 20), (2, 9), (0, 5), (1, 40)), y="plain"),
    SgmvCase("prefill_rank_40", ((3, 45), (1, 90), (-1, 4)), rank=40, in_dim=2200, dtypes=FP16),
    SgmvCase(
        "prefill_stored_rank_256",
        ((3, 45), (1, 90), (-1, 4)),
        rank=256,
        ranks=(1, 33, 9, 200),
        in_dim=3104,
        out_dim=24,
        dtypes=HALVES,
    ),
    SgmvCase("prefill_rank_33", ((3, 45), (1, 90)), rank=33, ranks=(4, 33, 9, 17), dtypes=BF16),
    SgmvCase(
        "long_segments",
        ((0, 1701), (-1, 20), (2, 510)),
        slots=3,
        rank=33,
        in_dim=40,
        out_dim=72,
        y="plain",
    ),
    SgmvCase("long_in_parts", ((1, 2049),), in_dim=2056, rank=130, out_dim=64, dtypes=HALVES),
    SgmvCase("long", LONG, in_dim=24, out_dim=72, y="wide", bias=True, dtypes=HALVES),
    SgmvCase("long_float32", LONG, out_dim=8, y="wide", y_float32=True, dtypes=HALVES),
    SgmvCase("long_rank_32", LONG, in_dim=16, rank=32, y="wide", y_float32=True, dtypes=HALVES),
    SgmvCase("long_rank_50", LONG, in_dim=8, out_dim=8, rank=50, y="plain", dtypes=HALVES),
    SgmvCase("long_rank_120", LONG, in_dim=8, out_dim=8, rank=120, y="plain", dtypes=HALVES),
    SgmvCase("longer", LONGER, in_dim=8, out_dim=264, rank=64, y="wide", bias=True, dtypes=HALVES),
    SgmvCase("longer_rank_90", LONGER, in_dim=1032, out_dim=8, rank=90, dtypes=HALVES),
    SgmvCase(
        "longer_rank_128",
        LONGER,
        in_dim=8,
        out_dim=8,
        rank=128,
        y_float32=True,
        y="plain",
        dtypes=HALVES,
    ),
    SgmvCase("longer_rank_300", LONGER, in_dim=8, out_dim=8, rank=300, y="plain", dtypes=HALVES),
    SgmvCase(
        "longer_rank_200",
        LONGER,
        in_dim=8,
        out_dim=8,
        rank=200,
        y_float32=True,
        y="plain",
        dtypes=HALVES,
    ),
    SgmvCase("long_shifted", LONG, in_dim=8, y="shifted", y_float32=True, dtypes=HALVES),
    SgmvCase("prefill_float32", ((3, 45), (1, 90), (-1, 4)), y="wide", y_float32=True),
    SgmvCase("prefill_shifted", ((3, 45), (1, 90), (-1, 4)), y="shifted", y_float32=True),
    SgmvCase("prefill_b_shifted", ((3, 45), (1, 90), (-1, 4)), b="shifted", dtypes=FP16),
    # Layouts.
    SgmvCase("a_shifted", MIXED, a="shifted", rank=17),
    SgmvCase("a_transposed", MIXED, a="transposed", dtypes=FP16),
    SgmvCase("b_plain", MIXED, b="plain", y="plain"),
    SgmvCase("b_shifted", MIXED, b="shifted", dtypes=FP16),
    SgmvCase("y_plain", MIXED, y="plain"),
    SgmvCase("y_wide", MIXED, y="wide", bias=True),
    SgmvCase("y_shifted", MIXED, y="shifted", bias=True, dtypes=BF16),
    SgmvCase("y_float32", MIXED, y="wide", y_float32=True),
    SgmvCase("y_float32_shifted", MIXED, y="shifted", y_float32=True, bias=True),
    SgmvCase("bias", MIXED, bias=True, dtypes=BF16),
    # Llama-3-8B, down projection: long sums.
    SgmvCase(
        "llama_down",
        ((0, 100), (-1, 20), (1, 7), (2, 300), (3, 1)),
        in_dim=14336,
        out_dim=4096,
        rank=64,
        y="plain",
        gpu_only=True,
    ),
)


class SgmvProblem:
    """A case with numbers, on the host (`x`, `a`, ...) and on the device (`on_device`).

    NaN is in all that must not be read: base rows of x, unused slots, ranks beyond the true one.
    """

    def __init__(self, case: SgmvCase, kernels: KernelDevice, rng: np.random.Generator) -> None:
        poison = case.ranks_from != "neither"
        made = adapters(
            case.slots,
            case.rank,
            case.in_dim,
            case.out_dim,
            case.dtype,
            rng,
            ranks=case.ranks if poison else [case.rank] * case.slots,
            poison=poison,
        )
        self.case, self.kernels = case, kernels
        self.ids = np.array([slot for slot, _ in case.groups], np.int32)
        self.offsets = row_offsets([rows for _, rows in case.groups]).astype(case.metadata)
        self.a, self.b, bias = made.lora_a, made.lora_b, made.bias
        unused = np.setdiff1d(np.arange(case.slots), self.ids)
        self.a[unused] = self.b[unused] = bias[unused] = np.nan
        self.bias = bias if case.bias else None
        self.slot_ranks = made.slot_ranks if case.ranks_from in ("slots", "both") else None

        self.ranks = None  # as the caller says it
        if case.ranks_from in ("groups", "both"):
            true = made.slot_ranks[np.maximum(self.ids, 0)]
            smaller = np.where(np.arange(len(true)) % 2, true // 2, true + 5)
            self.ranks = (smaller if case.ranks_from == "both" else true).astype(case.metadata)
        self.effective = np.zeros(case.rows, np.int64)  # of each row
        self.base = np.ones(case.rows, np.bool_)
        first = 0
        for group, (slot, rows) in enumerate(case.groups):
            if slot >= 0:
                said = case.rank if self.ranks is None else int(self.ranks[group])
                self.effective[first : first + rows] = min(said, int(made.slot_ranks[slot]))
                self.base[first : first + rows] = False
            first += rows

        self.x = activations((case.rows, case.in_dim), case.dtype, rng)
        self.x[self.base] = np.nan
        self.h = activations((case.rows, case.rank), np.float32, rng)
        self.unread = np.arange(case.rank) >= self.effective[:, np.newaxis]
        self.h[self.unread] = np.nan
        self.y = activations((case.rows, case.out_dim), case.y_dtype, rng)
        self.y[self.base] = -0.0

    @property
    def metadata(self) -> tuple[Any, ...]:
        return self.ids, self.ranks, self.offsets

    @property
    def device_metadata(self) -> tuple[Any, ...]:
        return tuple(self._metadata(array) for array in self.metadata)

    @property
    def device_options(self) -> dict[str, Any]:
        bias = None if self.bias is None else self.kernels.asarray(self.bias)
        return {"slot_ranks": self._metadata(self.slot_ranks), "bias": bias}

    def _metadata(self, array: Any) -> Any:
        keep = array is None or self.case.host_metadata
        return array if keep else self.kernels.asarray(array)

    def device_a(self) -> Any:
        if self.case.a == "shifted":
            return shifted(self.kernels, self.a)
        if self.case.a == "transposed":
            return self.kernels.asarray(self.a.transpose(0, 2, 1)).transpose(0, 2, 1)
        return self.kernels.asarray(self.a)

    def device_b(self) -> Any:
        if self.case.b == "plain":
            return self.kernels.asarray(self.b)
        rank_major = np.ascontiguousarray(self.b.transpose(0, 2, 1))
        place = shifted if self.case.b == "shifted" else type(self.kernels).asarray
        return place(self.kernels, rank_major).transpose(0, 2, 1)

    def device_y(self) -> tuple[Any, Any]:
        """``(whole, y)``, y being a view of the whole array; None for a new result."""
        if self.case.y == "new":
            return None, None
        margin = {"plain": 0, "wide": 8, "shifted": 3}[self.case.y]
        whole = self.kernels.asarray(np.pad(self.y, ((1, 1), (margin, margin))))
        return whole, whole[1:-1, margin : margin + self.case.out_dim]

    def wide(self, array: NDArray[Any] | None) -> Any:
        return None if array is None else widen(array)

    def expected(self, op: Any, magnitude: bool, first: NDArray[Any], *weights: Any) -> Any:
        """An op of `lorakit.reference` on float64 arrays; with `magnitude` on their absolute values."""

        def exact(array: Any) -> Any:
            return None if array is None else np.abs(widen(array)) if magnitude else widen(array)

        options: dict[str, Any] = {"slot_ranks": self.slot_ranks}
        if op.__name__ != "sgmv_shrink":
            options |= {
                "bias": exact(self.bias),
                "add_to": None if self.case.y == "new" else exact(self.y),
            }
        return op(exact(first), *map(exact, weights), *self.metadata, **options)
