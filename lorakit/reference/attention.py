"""Reference of attention over the paged KV cache."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.reference.kv_cache import KVCache, places


@overload
def attention_ragged(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: Literal[False] = False,
) -> NDArray[Any]: ...


@overload
def attention_ragged(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: Literal[True],
) -> tuple[NDArray[Any], NDArray[Any]]: ...


@overload
def attention_ragged(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...


def attention_ragged(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """``softmax(scale * q @ keys.T) @ values`` for each sequence, over all its cached tokens.

    Sequence ``b`` has ``cache_lengths[b]`` tokens from before and its new ones, stored already.
    Causal is aligned bottom right; two cached and three new tokens give ::

        key       0 1 2 3 4
        query 0   1 1 1 . .
        query 1   1 1 1 1 .
        query 2   1 1 1 1 1

    Query head ``h`` reads kv head ``h // (n_heads // n_kv_heads)``. A key that a query does not see
    is not read for it, so a nan there cannot reach it. MAX: ``flash_attention_ragged``.

    Args:
        q: ``[total_tokens, n_heads, head_dim]``.
        input_row_offsets: ``[batch_size + 1]``.
        kv_collection: see :class:`KVCache`.
        layer_idx: layer of the cache.
        scale: multiplies the scores; None is ``head_dim ** -0.5``, 0.0 is a value.
        causal: whether a query sees only the keys up to its own position.
        return_lse: also return the log-sum-exp of the scaled scores, natural logarithm.

    Returns:
        ``[total_tokens, n_heads, head_dim]`` in ``q``'s dtype; with ``return_lse`` also
        ``[total_tokens, n_heads]`` float32. Rows that see no key (those past the last offset, or
        whose scores are all -inf) are 0, and their LSE -inf.
    """
    blocks = kv_collection.blocks
    n_kv_heads, head_dim = blocks.shape[4:]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros(q.shape, q.dtype)
    lse = np.full(q.shape[:2], -np.inf, np.promote_types(q.dtype, np.float32))

    for b in range(len(input_row_offsets) - 1):
        start, stop = int(input_row_offsets[b]), int(input_row_offsets[b + 1])
        cached = int(kv_collection.cache_lengths[b])
        pages, slots = places(kv_collection, b, 0, cached + stop - start)
        # [n_kv_heads, tokens, head_dim]
        keys = blocks[pages, 0, layer_idx, slots].astype(np.float64).transpose(1, 0, 2)
        values = blocks[pages, 1, layer_idx, slots].astype(np.float64).transpose(1, 0, 2)

        for t in range(start, stop):
            seen = cached + t - start + 1 if causal else cached + stop - start
            query = q[t].astype(np.float64).reshape(n_kv_heads, -1, head_dim)
            scores = scale * query @ keys[:, :seen].transpose(0, 2, 1)
            highest = scores.max(axis=2, keepdims=True)
            # -inf - -inf would be nan: a row without a finite score keeps its zeros.
            weights = np.exp(scores - np.where(highest == -np.inf, 0.0, highest))
            total = weights.sum(axis=2, keepdims=True)
            divisor = np.where(total == 0.0, 1.0, total)
            out[t] = (weights @ values[:, :seen] / divisor).reshape(q[t].shape).astype(q.dtype)
            with np.errstate(divide="ignore"):
                lse[t] = (highest + np.log(total)).reshape(-1)
    return (out, lse) if return_lse else out
