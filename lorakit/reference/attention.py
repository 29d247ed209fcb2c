"""Reference of attention over the paged KV cache."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.reference.kv_cache import KVCache, places

# How many keys before and after its own a query sees; None: all.
Window: TypeAlias = "tuple[int | None, int | None] | None"


def visible_keys(position: int, num_keys: int, causal: bool, window: Window) -> slice:
    """Which keys of its sequence the query at ``position`` sees: a run that holds its own."""
    left, right = (None, None) if window is None else window
    start = 0 if left is None else max(position - left, 0)
    stop = num_keys if right is None else min(position + right + 1, num_keys)
    return slice(start, min(stop, position + 1) if causal else stop)


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
    window: Window = None,
    soft_cap: float | None = None,
    sinks: NDArray[Any] | None = None,
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
    window: Window = None,
    soft_cap: float | None = None,
    sinks: NDArray[Any] | None = None,
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
    window: Window = None,
    soft_cap: float | None = None,
    sinks: NDArray[Any] | None = None,
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
    window: Window = None,
    soft_cap: float | None = None,
    sinks: NDArray[Any] | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """``softmax(scale * q @ keys.T) @ values`` for each sequence, over all its cached tokens.

    Sequence ``b`` has ``cache_lengths[b]`` tokens from before and its new ones, stored already.
    Causal is aligned bottom right; two cached and three new tokens give ::

        key       0 1 2 3 4
        query 0   1 1 1 . .
        query 1   1 1 1 1 .
        query 2   1 1 1 1 1

    A window (1, None) leaves of them ::

        query 0   . 1 1 . .
        query 1   . . 1 1 .
        query 2   . . . 1 1

    Query head ``h`` reads kv head ``h // (n_heads // n_kv_heads)``. A key that a query does not see
    is not read for it, so a nan there cannot reach it. MAX: ``flash_attention_ragged``.

    Args:
        q: ``[total_tokens, n_heads, head_dim]``.
        input_row_offsets: ``[batch_size + 1]``.
        kv_collection: see :class:`KVCache`.
        layer_idx: layer of the cache.
        scale: multiplies the scores; None is ``head_dim ** -0.5``, 0.0 is a value.
        causal: whether a query sees only the keys up to its own position.
        return_lse: also return the log-sum-exp of the scores and sinks, natural logarithm.
        window: ``(left, right)``: a query at position ``p`` sees the keys from ``p - left`` to
            ``p + right`` only; None in a place is no bound.
        soft_cap: scores are ``soft_cap * tanh(scaled score / soft_cap)``.
        sinks: ``[n_heads]``, for each query head a score that has no value, as of one more key.

    Returns:
        ``[total_tokens, n_heads, head_dim]`` in ``q``'s dtype; with ``return_lse`` also
        ``[total_tokens, n_heads]`` float32. Rows that see no key (those past the last offset, or
        whose scores are all -inf) are 0, and their LSE -inf.
    """
    layer_keys, layer_values = kv_collection.layer(layer_idx)
    _, page_size, n_kv_heads, head_dim = layer_keys.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros(q.shape, q.dtype)
    lse = np.full(q.shape[:2], -np.inf, np.promote_types(q.dtype, np.float32))

    for b in range(len(input_row_offsets) - 1):
        start, stop = int(input_row_offsets[b]), int(input_row_offsets[b + 1])
        cached = int(kv_collection.cache_lengths[b])
        pages, slots = places(kv_collection, page_size, b, 0, cached + stop - start)
        # [n_kv_heads, tokens, head_dim]
        keys = layer_keys[pages, slots].astype(np.float64).transpose(1, 0, 2)
        values = layer_values[pages, slots].astype(np.float64).transpose(1, 0, 2)

        for t in range(start, stop):
            seen = visible_keys(cached + t - start, cached + stop - start, causal, window)
            query = q[t].astype(np.float64).reshape(n_kv_heads, -1, head_dim)
            scores = scale * query @ keys[:, seen].transpose(0, 2, 1)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            highest = scores.max(axis=2, keepdims=True)
            # Without a score above -inf there is nothing to see, and a sink counts for nothing.
            blind = highest == -np.inf
            sink = np.full(blind.shape, -np.inf)
            if sinks is not None:
                sink = np.where(blind, sink, sinks.astype(np.float64).reshape(blind.shape))
            highest = np.maximum(highest, sink)
            # -inf - -inf would be nan: such a row keeps its zeros. So would inf - inf, of a sink.
            weights = np.exp(scores - np.where(blind, 0.0, highest))
            below = np.subtract(sink, highest, out=np.zeros_like(sink), where=sink < highest)
            total = weights.sum(axis=2, keepdims=True) + np.where(blind, 0.0, np.exp(below))
            divisor = np.where(blind, 1.0, total)
            out[t] = (weights @ values[:, seen] / divisor).reshape(q[t].shape).astype(q.dtype)
            with np.errstate(divide="ignore"):
                lse[t] = (highest + np.log(total)).reshape(-1)
    return (out, lse) if return_lse else out
