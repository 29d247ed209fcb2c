"""What the layer tests share: random arrays, small layers, and an oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit import (
    AttentionWithRopeAndLoRA,
    DeviceRef,
    DType,
    KVCacheParams,
    PagedKVCacheManager,
    RotaryEmbedding,
)
from lorakit.nn.arrays import upload

Array = NDArray[Any]
STORAGE = (DType.float32, DType.float16, DType.bfloat16)


def offsets(*lengths: int) -> NDArray[np.uint32]:
    """Row offsets of sequences of these lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)


def normal(seed: int, *shape: int, dtype: DType = DType.float32, scale: float = 1.0) -> Array:
    """Normal numbers, rounded to a storage dtype."""
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return values.astype(dtype.to_numpy())


def wide(array: Array) -> NDArray[np.float64]:
    return np.asarray(array).astype(np.float64)


def rounding(dtype: DType | None) -> Callable[[Array], Array]:
    """Rounds to a dtype and back to float64; None: does nothing."""
    if dtype is None:
        return lambda array: array
    return lambda array: array.astype(dtype.to_numpy()).astype(np.float64)


def assert_within_budget(actual: Array, exact: Array, rounded: Array) -> None:
    """`actual` errs at most twice as much as `rounded`, plus one unit in the last place.

    `rounded` is the same computation in float64 that rounds to the storage dtype wherever the layer
    stores; a floor of 2^-20 of the largest value stands for sums in float32.
    """
    assert actual.shape == exact.shape
    exact = wide(exact)
    eps = {2: 2.0**-7 if actual.dtype.name == "bfloat16" else 2.0**-10, 4: 2.0**-20}
    budget = 2 * np.abs(wide(rounded) - exact).max(initial=0)
    budget += eps[actual.dtype.itemsize] * np.abs(exact).max(initial=0)
    error = np.abs(wide(actual) - exact).max(initial=0)
    assert error <= budget, f"error {error} is above its budget {budget}"


@dataclass
class Model:
    """The weights of an attention layer in float64, and what it computes, written once more."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    weights: dict[str, Array]  # q, k, v, o -> [out, in]
    biases: dict[str, Array]  # q, k, v -> [out]
    theta: float = 10000.0
    interleaved: bool = True
    scale: float | None = None
    left: int | None = None
    soft_cap: float | None = None
    sinks: Array | None = None

    def rows(
        self,
        x: Array,
        adapter: dict[str, tuple[Array, Array]] | None = None,
        lora_biases: dict[str, Array] | None = None,
        *,
        dtype: DType | None = None,
    ) -> Array:
        """The layer's result for all tokens of one sequence, from position 0 on.

        Args:
            x: ``[tokens, hidden]``.
            adapter: Projection -> (A, scaled B).
            lora_biases: Projection -> bias of the adapter.
            dtype: Round wherever the layer stores.
        """
        store = rounding(dtype)

        def project(name: str, rows: Array) -> Array:
            y = store(rows @ self.weights[name].T + self.biases.get(name, 0.0))
            delta: Any = 0.0
            if adapter is not None and name in adapter:
                a, b = adapter[name]
                delta = (rows @ a.T) @ b.T
            if lora_biases is not None:
                delta = delta + lora_biases[name]
            return store(y + delta)

        x = wide(x)
        tokens = len(x)
        q = project("q", x).reshape(tokens, self.n_heads, self.head_dim)
        k = project("k", x).reshape(tokens, self.n_kv_heads, self.head_dim)
        v = project("v", x).reshape(tokens, self.n_kv_heads, self.head_dim)
        q, k = store(self._rotate(q)), store(self._rotate(k))
        attended = np.zeros((tokens, self.n_heads, self.head_dim))
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        for head in range(self.n_heads):
            shared = head // (self.n_heads // self.n_kv_heads)
            for t in range(tokens):
                first = 0 if self.left is None else max(t - self.left, 0)
                scores = scale * (k[first : t + 1, shared] @ q[t, head])
                if self.soft_cap is not None:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                p = np.exp(scores)
                sink = 0.0 if self.sinks is None else np.exp(self.sinks[head])
                attended[t, head] = p @ v[first : t + 1, shared] / (p.sum() + sink)
        return project("o", store(attended.reshape(tokens, -1)))

    def _rotate(self, heads: Array) -> Array:
        half = self.head_dim // 2
        turns = np.exp(
            1j
            * np.arange(len(heads))[:, None]
            * self.theta ** (-2 * np.arange(half) / self.head_dim)
        )[:, None]
        if self.interleaved:
            y = (heads[..., 0::2] + 1j * heads[..., 1::2]) * turns
            return np.stack([y.real, y.imag], axis=-1).reshape(heads.shape)
        y = (heads[..., :half] + 1j * heads[..., half:]) * turns
        return np.concatenate([y.real, y.imag], axis=-1)


@dataclass
class Setup:
    """An attention layer, the oracle of its weights, and a cache."""

    layer: AttentionWithRopeAndLoRA
    model: Model
    manager: PagedKVCacheManager
    rope: RotaryEmbedding
    dtype: DType
    hidden: int

    def adapter(self, seed: int, rank: int, scale: float = 0.3) -> dict[str, tuple[Array, Array]]:
        """Random (A, B) for each projection, in float32 values that the storage dtype holds."""
        store = rounding(self.dtype)
        return {
            name: (
                store(wide(normal(seed + 2 * i, rank, w.shape[1], scale=scale))),
                store(wide(normal(seed + 2 * i + 1, w.shape[0], rank, scale=scale))),
            )
            for i, (name, w) in enumerate(self.model.weights.items())
        }

    def put(self, slot: int, adapter: dict[str, tuple[Array, Array]], scaling: float = 1.0) -> None:
        """Load an adapter into a slot of all four projections."""
        for name, (a, b) in adapter.items():
            getattr(self.layer, f"{name}_proj").set_adapter(
                slot, a.astype(np.float32), b.astype(np.float32), scaling=scaling
            )

    def tokens(self, seed: int, count: int) -> Array:
        return normal(seed, count, self.hidden, dtype=self.dtype)


def setup(
    device: DeviceRef,
    dtype: DType = DType.float32,
    *,
    n_heads: int = 6,
    n_kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int = 40,
    page_size: int = 3,
    pages: int = 70,  # more than any test needs
    layers: int = 2,
    has_bias: bool = False,
    interleaved: bool = True,
    layer_cls: type[Any] = AttentionWithRopeAndLoRA,
    sinks: Array | None = None,
    **arguments: Any,
) -> Setup:
    """A small layer with random weights; 6 heads on 2, Q != hidden, pages of 3 tokens."""
    params = KVCacheParams(dtype, n_kv_heads, head_dim, page_size=page_size)
    rope = RotaryEmbedding(
        n_heads * head_dim, n_heads, 10000.0, 64, device, interleaved=interleaved
    )
    layer = layer_cls(
        rope=rope,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        hidden_size=hidden,
        kv_params=params,
        devices=[device],
        dtype=dtype,
        has_bias=has_bias,
        sinks=None if sinks is None else upload(sinks, device),
        **arguments,
    )
    rows = {"q": n_heads * head_dim, "k": n_kv_heads * head_dim, "v": n_kv_heads * head_dim}
    weights = {
        name: normal(10 + i, count, hidden, dtype=dtype, scale=hidden**-0.5)
        for i, (name, count) in enumerate(rows.items())
    }
    weights["o"] = normal(13, hidden, rows["q"], dtype=dtype, scale=rows["q"] ** -0.5)
    biases = {
        name: normal(20 + i, count, dtype=dtype) if has_bias else np.zeros(0)
        for i, (name, count) in enumerate(rows.items())
    }
    layer.load_state_dict(state_of(weights, biases if has_bias else {}, layer.stacked_qkv))
    element = dtype.to_numpy().itemsize
    page_bytes = 2 * layers * page_size * n_kv_heads * head_dim * element
    manager = PagedKVCacheManager(
        params, 8, 64, layers, [device], pages * page_bytes, page_size, enable_runtime_checks=True
    )
    manager.blocks[...] = np.nan  # slots without a token must never matter
    model = Model(
        n_heads,
        n_kv_heads,
        head_dim,
        {name: wide(w) for name, w in weights.items()},
        {name: wide(b) for name, b in biases.items()} if has_bias else {},
        interleaved=interleaved,
        scale=arguments.get("scale"),
        left=(arguments.get("window") or (None,))[0],
        soft_cap=arguments.get("soft_cap"),
        sinks=None if sinks is None else wide(sinks),
    )
    return Setup(layer, model, manager, rope, dtype, hidden)


def state_of(
    weights: dict[str, Array], biases: dict[str, Array], stacked: bool
) -> dict[str, Array]:
    """The base checkpoint of a layer."""
    state = {"o_proj.weight": weights["o"]}
    for kind, parts in (("weight", weights), ("bias", biases)):
        if not parts:
            continue
        if stacked:
            state[f"qkv_proj.{kind}"] = np.concatenate([parts[name] for name in "qkv"])
        else:
            state |= {f"{name}_proj.{kind}": parts[name] for name in "qkv"}
    return state


def claim(manager: PagedKVCacheManager, requests: Sequence[str]) -> None:
    for request in requests:
        manager.claim(request)
