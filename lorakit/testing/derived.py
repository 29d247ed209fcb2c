"""Error that an op's arithmetic explains, where it takes more than the reference on |inputs|."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from lorakit.reference import rope_ragged
from lorakit.reference.attention import Window, visible_keys
from lorakit.reference.kv_cache import KVCache, places
from lorakit.testing.budget import UNIT_ROUNDOFF, sum_factor
from lorakit.testing.inputs import PagedCache, widen


def rope_terms(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: PagedCache,
    freqs_cis: NDArray[Any],
    layer_idx: int,
    *,
    interleaved: bool = True,
    rotate_last: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``terms64`` of a rotation, a sum of length 2, for the queries and for all of ``blocks``.

    ``|re cos| + |im sin|`` and ``|re sin| + |im cos|``: each is what the rotation of absolute
    values gives for one of two signs of the sine, and the other sign never gives more.
    """
    terms = []
    for sign in (1.0, -1.0):
        table = np.abs(freqs_cis)
        table[:, 1::2] *= sign
        cache = replace(kv_collection, blocks=np.abs(widen(kv_collection.blocks)))
        rotated = rope_ragged(
            np.abs(widen(q)),
            input_row_offsets,
            cache,
            table,
            layer_idx,
            interleaved=interleaved,
            rotate_last=rotate_last,
        )
        terms.append((rotated, cache.blocks))
    return np.maximum(terms[0][0], terms[1][0]), np.maximum(terms[0][1], terms[1][1])


def attention_error(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    soft_cap: float | None = None,
    sinks: NDArray[Any] | None = None,
    probability_dtype: DTypeLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``propagated64`` of attention in float32, for the output and for the LSE.

    With ``u = 2**-24``, ``D`` the head dimension, ``L`` the keys that a query sees, ``S`` the
    largest of their ``|scale| * sum |q k|``, and ``P = sum p |v|`` the average of ``|v|``:

    * a score errs by ``c(D) u S`` (its sum) and ``16 u S``: scale and base-2 factor are rounded and
      multiplied, and the running maximum is subtracted, each a few roundings of numbers up to
      ``2 S``;
    * a probability has the relative error ``e = (c(D) + 16) u S + 4 u``, the last for exp2 of two
      units in the last place. Numerator and denominator share it with either sign: ``2 e P``;
    * the sums of ``p v`` and of ``p``, and rescaling both when the maximum moves, err by
      ``3 c(L) u P``, the division by ``4 u P``;
    * rounding ``p``, at most 1, to ``probability_dtype`` for the tensor cores errs by half a unit
      in the last place of each: ``sum h |v|`` with ``h = max(p * half a unit at 1, half the
      smallest subnormal)``, over the denominator;
    * the LSE errs by ``e`` (through scores and sum), ``c(L) u`` (the sum) and ``4 u log(1 + L)``
      (the logarithm).

    A soft cap ``C`` makes ``C tanh(s / C)`` of a score: an error of ``s`` is carried on with a slope of
    at most 1. Dividing by ``C``, tanh (two units in the last place) and multiplying by ``C`` again are
    ``8 u`` more, of a result that exceeds neither ``S`` nor ``C``; and ``2**-126 C``, since an ``s / C``
    below that is flushed to zero.

    A sink is one more probability, with a value of 0: ``P`` and the denominators are with it, and so
    is the number of terms. Its score is not a sum of products, but is multiplied and subtracted like
    one, and so is the maximum if it is that: the ``16 u`` are of the larger of ``S`` and ``|sink|``.
    If it exceeds all scores the sums are rescaled by ``exp(largest score - sink)``, which is flushed
    to zero below ``2**-126``: that much is lost of ``sum p |v|``, ``p`` being 1 for the largest score. So is
    a result below ``2**-126``, which only a sink makes that small.

    Second-order terms are left out; each is smaller by 2**-10 or more.

    Args:
        probability_dtype: what probabilities are rounded to before they meet the values; None for
            float32. All others as in :func:`lorakit.reference.attention_ragged`.

    Returns:
        ``[total_tokens, n_heads, head_dim]`` and ``[total_tokens, n_heads]``, absolute errors.
    """
    layer_keys, layer_values = kv_collection.layer(layer_idx)
    _, page_size, n_kv_heads, head_dim = layer_keys.shape
    scale = head_dim**-0.5 if scale is None else scale
    relative = smallest = 0.0
    if probability_dtype is not None:
        info: Any = ml_dtypes.finfo(np.dtype(probability_dtype))  # type: ignore[no-untyped-call]
        relative, smallest = float(info.eps) / 2, float(info.smallest_subnormal) / 2
    out_error = np.zeros(q.shape)
    lse_error = np.zeros(q.shape[:2])
    for b in range(len(input_row_offsets) - 1):
        start, stop = int(input_row_offsets[b]), int(input_row_offsets[b + 1])
        cached = int(kv_collection.cache_lengths[b])
        pages, slots = places(kv_collection, page_size, b, 0, cached + stop - start)
        keys = widen(layer_keys[pages, slots]).transpose(1, 2, 0)
        values = np.abs(widen(layer_values[pages, slots])).transpose(1, 0, 2)
        for t in range(start, stop):
            seen = visible_keys(cached + t - start, cached + stop - start, causal, window)
            query = widen(q[t]).reshape(n_kv_heads, -1, head_dim)
            scores = scale * query @ keys[..., seen]
            size = (abs(scale) * np.abs(query) @ np.abs(keys[..., seen])).max(axis=2, keepdims=True)
            rounded_size, terms, capping = size, scores.shape[2], 0.0
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
                capping = 8 * np.minimum(size, soft_cap) * UNIT_ROUNDOFF + 2.0**-126 * soft_cap
            highest = scores.max(axis=2, keepdims=True)
            sink = np.full(highest.shape, -np.inf)
            if sinks is not None:
                sink, terms = widen(sinks).reshape(highest.shape), terms + 1
                rounded_size = np.maximum(size, np.where(np.isfinite(sink), np.abs(sink), 0.0))
            p = np.exp(scores - np.maximum(highest, sink))
            total = p.sum(axis=2, keepdims=True) + np.exp(sink - np.maximum(highest, sink))

            e = (sum_factor(head_dim) * size + 16 * rounded_size + 4) * UNIT_ROUNDOFF + capping
            average = p @ values[:, seen] / total
            rounded = np.maximum(relative * p, smallest) @ values[:, seen] / total
            summed = (3 * sum_factor(terms) + 4) * UNIT_ROUNDOFF
            out_error[t] = ((2 * e + summed) * average + rounded).reshape(q[t].shape)
            if sinks is not None:
                flushed = 2.0**-126 * np.exp(scores - highest) @ values[:, seen]
                out_error[t] += flushed.reshape(q[t].shape) + 2.0**-126
            log_error = (sum_factor(terms) + 4 * np.log1p(terms)) * UNIT_ROUNDOFF
            lse_error[t] = (e + log_error).reshape(-1)
    return out_error, lse_error
