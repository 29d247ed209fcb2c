"""sgmv_qkv_lora: the query delta, and the deltas of keys and values in the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import ops, reference, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import (
    activations,
    adapters,
    assert_bitwise_equal,
    assert_within_budget,
    row_offsets,
    widen,
)
from lorakit.tiles import Instance
from tests.ops.helpers import (
    FLOAT16,
    CacheCase,
    launches,
    parameters,
    skip_where_slow,
    split_error,
    step_slots,
)
from tests.ops.sgmv_cases import SHARED_BYTES

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

BF16, FP16 = (bfloat16,), (FLOAT16,)


@dataclass(frozen=True)
class Case(CacheCase):
    groups: tuple[tuple[int, int], ...] = ()
    """(slot, rows); they need not be those of the sequences."""
    in_dim: int = 64
    ranks: tuple[int, int, int] = (8, 8, 8)
    """Stored ranks of q, k and v."""
    bias: bool = False

    def instances(self, shared_bytes: int = SHARED_BYTES) -> set[Instance]:
        if not self.total_tokens:
            return set()
        blocks = sum(-(-rank // 16) for rank in self.ranks)
        item_rows = tiles.sgmv_item_rows(self.total_tokens, min(len(self.groups), 4))
        max_items = self.total_tokens // item_rows + min(self.total_tokens, len(self.groups), 4)
        few = tiles.sgmv_is_few(max_items, blocks, -(-self.in_dim // 1024))
        return {
            tiles.sgmv_route_items(),
            tiles.sgmv_shrink(self.dtype, blocks, item_rows, True, few),
            tiles.sgmv_expand(self.dtype, self.dtype, self.ranks[0], item_rows, True, shared_bytes),
            tiles.sgmv_expand(
                self.dtype, np.float32, max(self.ranks[1:]), item_rows, True, shared_bytes
            ),
            tiles.add_kv(self.dtype, np.float32),
        }


CASES = (
    # MAX's own case: 256 query and 64 key columns of rank 8.
    Case("max_one_adapter", (0, 0), (12, 9), n_kv_heads=1, dtypes=BF16, groups=((1, 21),)),
    Case(
        "max_mixed",
        (3, 0, 7),
        (4, 9, 1),
        n_kv_heads=1,
        dtypes=BF16,
        groups=((2, 4), (-1, 9), (0, 1)),
    ),
    Case("mixed", (3, 17, 0), (4, 1, 7), groups=((0, 4), (-1, 1), (3, 7))),
    Case(
        "groups_across_sequences",
        (3, 17, 0),
        (4, 1, 7),
        groups=((0, 2), (2, 9), (-1, 1)),
        bias=True,
    ),
    Case("unequal_ranks", (5, 0), (2, 3), groups=((1, 2), (2, 3)), ranks=(65, 1, 17), dtypes=FP16),
    Case("all_base", (5, 0), (2, 3), groups=((-1, 5),), bias=True),
    Case("empty_sequences", (5, 0, 4), (2, 0, 3), groups=((1, 0), (2, 4)), dtypes=BF16),
    Case("no_tokens", (5, 0), (0, 0), groups=((1, 0),), dtypes=BF16),
    Case("page_size_3", (5, 0), (2, 7), page_size=3, groups=((1, 9),), head_dim=40, dtypes=FP16),
    Case("host_metadata", (5, 0), (2, 3), groups=((1, 4),), host_metadata=True, dtypes=BF16),
    Case(
        "llama",
        (100, 0, 3000),
        (1, 300, 1),
        page_size=128,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        in_dim=4096,
        ranks=(64, 64, 64),
        groups=((1, 1), (-1, 200), (2, 101)),
        gpu_only=True,
    ),
)


@parameters(CASES, Case.instances)
def test_qkv_lora(case: Case, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    cache = case.cache(rng)
    cache.blocks[:, :, case.layer_idx, :, :, 0] = -0.0  # a base row keeps even this
    widths = (case.n_heads, case.n_kv_heads, case.n_kv_heads)
    modules = [
        adapters(4, rank, case.in_dim, heads * case.head_dim, case.dtype, rng, poison=True)
        for rank, heads in zip(case.ranks, widths, strict=True)
    ]
    x = activations((case.total_tokens, case.in_dim), case.dtype, rng)
    slots = [slot for slot, rows in case.groups for _ in range(rows)]
    base = np.array([*slots, *[-1] * (case.total_tokens - len(slots))]) < 0
    x[base] = np.nan
    ids = np.array([slot for slot, _ in case.groups], np.int32)
    group_offsets = row_offsets([rows for _, rows in case.groups])
    offsets, on_device = case.place(kernels, cache)
    triples = {
        "slot_ranks": [module.slot_ranks for module in modules],
        "bias": [module.bias for module in modules] if case.bias else None,
    }

    place = kernels.asarray
    options: dict[str, Any] = {
        name: triple and [*map(place, triple)] for name, triple in triples.items()
    }
    with launches(kernels) as seen:
        q = ops.sgmv_qkv_lora(
            place(x),
            [place(module.lora_a) for module in modules],
            [place(module.lora_b.transpose(0, 2, 1)).transpose(0, 2, 1) for module in modules],
            place(ids),
            None,
            place(group_offsets),
            offsets,
            on_device,
            case.layer_idx,
            **options,
        )
    assert seen == case.instances(kernels.backend.shared_bytes)

    def exact(transform: Any) -> tuple[Any, Any]:
        wide = replace(cache, blocks=transform(widen(cache.blocks)))
        deltas = reference.sgmv_qkv_lora(
            transform(widen(x)),
            [transform(widen(module.lora_a)) for module in modules],
            [transform(widen(module.lora_b)) for module in modules],
            ids,
            None,
            group_offsets,
            case.offsets(),
            wide,
            case.layer_idx,
            slot_ranks=triples["slot_ranks"],
            bias=[transform(widen(module.bias)) for module in modules] if case.bias else None,
        )
        return deltas, wide.blocks

    (exact_q, exact_blocks), (terms_q, terms) = exact(lambda array: array), exact(np.abs)
    length = (case.in_dim, max(case.ranks) + 3)
    lost = split_error(case.dtype)
    assert_within_budget(
        q, exact_q, case.dtype, terms_q, length=length, propagated64=lost * terms_q, name="queries"
    )
    assert_within_budget(
        on_device.blocks,
        exact_blocks,
        case.dtype,
        terms,
        length=length,
        propagated64=lost * np.nan_to_num(terms),
        name="cache",
    )
    assert_bitwise_equal(kernels.to_host(q)[base], np.zeros((base.sum(), q.shape[1]), case.dtype))
    # Base rows and all other slots keep their bits.
    changed = step_slots(case, cache, 0) | step_slots(case, cache, 1)
    row = 0
    for b, new in enumerate(case.new):
        for position in range(case.cached[b], case.cached[b] + new):
            if base[row]:
                page, slot = divmod(position, case.page_size)
                changed[cache.lookup_table[b, page], :, case.layer_idx, slot] = False
            row += 1
    assert_bitwise_equal(
        kernels.to_host(on_device.blocks)[~changed], cache.blocks[~changed], "the rest of the cache"
    )
