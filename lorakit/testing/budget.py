"""How far a result may be from the exact one, derived from the arithmetic and never tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from lorakit.dtypes import ulp

UNIT_ROUNDOFF = 2.0**-24
"""A float32 operation that rounds to nearest errs by at most this share of its result."""


def to_host(array: Any) -> NDArray[Any]:
    """The array as a plain NumPy array; copies from a device when it has to."""
    return np.array(array.get() if hasattr(array, "get") else array, copy=None, subok=False)


def sum_factor(length: int | Sequence[int]) -> float:
    """``c`` in ``|float32 sum - exact sum| <= c * 2**-24 * sum of |terms|``.

    For one sum of ``n`` products ``c(n) = min(2 n, 8 sqrt(n))``. For nested sums (shrink then
    expand) give all lengths: their factors add, because the error of the inner sum is carried by
    the outer one with the very weights that make up its terms.

    *Why.* No partial sum exceeds the sum of |terms|, so each addition adds at most ``u = 2**-24``
    of that, or ``2 u`` where the hardware truncates instead of rounding, as tensor cores do when
    they align products. ``n`` additions in any order stay below ``2 n u``: nothing can exceed it,
    and for short sums it is the budget.

    For long sums it is far too kind. Rounding errors behave like independent ones without bias,
    and then grow with ``sqrt(n)`` (Higham and Mary, 2019): they stay within ``l sqrt(n) u`` but
    for ``2 exp(-l**2 / 2)`` of the results, and ``l = 8`` leaves 3e-14. Truncation is biased and
    grows with the number of truncations; but a tensor-core instruction adds 8 products or more
    between two of them, which leaves ``2 u n / 8``, halved because a partial sum is on average
    half of the last one: not more than ``8 sqrt(n) u`` up to ``n`` = 4096 in one chain. Kernels
    cut longer sums, as any that adds 16 at a time does up to 16384.

    So a kernel passes in whichever order it sums, and one that computes in TF32 or rounds its
    partial sums to half precision does not; to show that, choose ``n`` up to a few hundred, where
    the budget is far below ``2**-11``.
    """
    lengths = [length] if isinstance(length, int) else length
    return float(sum(min(2.0 * n, 8.0 * n**0.5) for n in lengths))


def assert_within_budget(
    actual: Any,
    exact64: ArrayLike,
    dtype: DTypeLike,
    terms64: ArrayLike | None = None,
    stores: int = 1,
    *,
    length: int | Sequence[int] = (),
    largest64: ArrayLike | None = None,
    propagated64: ArrayLike | None = None,
    name: str = "result",
) -> float:
    """Asserts that every element of a result errs no more than its arithmetic explains.

    The budget of an element is the sum of

    1. *storing*: ``(stores + 1)`` units in the last place of ``dtype``. One rounding to nearest
       errs by half a unit, so that the rounded reference errs by up to ``stores / 2``; a kernel may
       err twice as much, plus one unit. The unit is taken at ``max(|exact|, largest)`` plus parts
       2 and 3, since it is the computed value and not the exact one that is rounded.
    2. *summing*: ``sum_factor(length) * 2**-24 * terms``, the float32 accumulation; and ``2**-126``
       for each addition, since CuPy compiles with subnormals flushed to zero.
    3. *propagated*: the error that is in the inputs already, carried to the result by the caller.

    nan must meet nan, and infinity the same infinity. Infinity is also right for a finite value
    that is within its budget of overflowing ``dtype``; it counts as the number that would follow
    the largest.

    Args:
        actual: the result, on the host or a device, in ``dtype``.
        exact64: the same from exact arithmetic, float64.
        dtype: what the result is stored in; the dtype of ``actual`` must be it.
        terms64: sum of the absolute terms of each element: the reference on absolute values gives
            it. Needs ``length``.
        stores: roundings to ``dtype`` on the way, the last included.
        length: terms in a sum; several for nested sums.
        largest64: the largest magnitude that was stored on the way, where an earlier store was of
            a larger number than the last (``round(round(base) + delta)`` with cancellation).
        propagated64: absolute error allowed because of the inputs, float64.
        name: what the message calls the result.

    Returns:
        The largest share of its budget that an element used; 0 for an empty result.

    Raises:
        AssertionError: names the element that exceeds its budget by the largest factor, with its
            coordinates, both values, the error and the parts of the budget.
        ValueError: ``terms64`` without ``length``.
    """
    dtype = np.dtype(dtype)
    host, exact = to_host(actual), np.asarray(exact64, np.float64)
    if terms64 is not None and not sum_factor(length):
        raise ValueError("length: wanted the number of terms in a sum with terms64, got none")
    if host.dtype != dtype:
        raise AssertionError(f"{name}: wanted dtype {dtype}, got {host.dtype}")
    if host.shape != exact.shape:
        raise AssertionError(f"{name}: wanted shape {exact.shape}, got {host.shape}")
    if host.size == 0:
        return 0.0

    got = host.astype(np.float64)
    finite = np.isfinite(exact)
    size = np.where(finite, np.abs(exact), 0.0)
    zero = np.zeros(exact.shape)
    summing = zero if terms64 is None else sum_factor(length) * UNIT_ROUNDOFF * _known(terms64)
    summing = summing + 2.0**-126 * sum([length] if isinstance(length, int) else length)
    propagated = zero if propagated64 is None else zero + _known(propagated64)
    largest = size if largest64 is None else np.maximum(size, _known(largest64))
    storing = (stores + 1) * ulp(largest + summing + propagated, dtype)
    budget = storing + summing + propagated

    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    beyond = float(info.max) + float(ulp(info.max, dtype))
    got = np.where(np.isinf(got) & finite, np.copysign(beyond, got), got)
    with np.errstate(invalid="ignore"):
        error = np.where(got == exact, 0.0, np.abs(got - exact))
    error = np.where(np.isnan(got) & np.isnan(exact), 0.0, error)
    error = np.where(np.isnan(error), np.inf, error)

    share = error / budget
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(share), share.shape))
    if share[worst] > 1.0:
        raise AssertionError(
            f"{name}: {np.count_nonzero(share > 1.0)} of {share.size} elements are beyond their "
            f"budget; the worst is {list(worst)}: got {float(host[worst])!r}, exact "
            f"{float(exact[worst])!r}, error {error[worst]:.4g}, budget {budget[worst]:.4g} "
            f"(storing {storing[worst]:.4g} = {stores + 1} ulp of {dtype}, summing "
            f"{summing[worst]:.4g}, propagated {propagated[worst]:.4g})"
        )
    return float(share[worst])


def _known(magnitude: ArrayLike) -> NDArray[np.float64]:
    """Absolute values; 0 where the exact result is not finite and the budget does not matter."""
    values = np.abs(np.asarray(magnitude, np.float64))
    return np.where(np.isfinite(values), values, 0.0)


def assert_bitwise_equal(a: Any, b: Any, name: str = "result") -> None:
    """Asserts that two arrays have the same dtype, shape and bits: nan equals the same nan only.

    Raises:
        AssertionError: gives the first element that differs, its coordinates, both values and bits.
    """
    left, right = to_host(a), to_host(b)
    if left.dtype != right.dtype or left.shape != right.shape:
        raise AssertionError(
            f"{name}: {left.dtype} {list(left.shape)} against {right.dtype} {list(right.shape)}"
        )
    word = np.dtype(f"u{left.dtype.itemsize}")
    left_bits = np.ascontiguousarray(left).reshape(-1).view(word)
    right_bits = np.ascontiguousarray(right).reshape(-1).view(word)
    differs = np.flatnonzero(left_bits != right_bits)
    if differs.size:
        first = int(differs[0])
        place = [int(i) for i in np.unravel_index(first, left.shape)]
        digits = 2 * left.dtype.itemsize
        raise AssertionError(
            f"{name}: {differs.size} of {left.size} elements differ; the first is {place}: "
            f"{left.reshape(-1)[first]} (0x{left_bits[first]:0{digits}x}) against "
            f"{right.reshape(-1)[first]} (0x{right_bits[first]:0{digits}x})"
        )


def count_bytes(*arrays: Any) -> int:
    """Bytes of the elements of all arrays; of a strided view only what it shows. None counts 0."""
    return sum(int(array.nbytes) for array in arrays if array is not None)
