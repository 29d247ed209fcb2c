"""Self-attention with rotary embedding over the paged cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorakit import checks, ops
from lorakit.nn.arrays import (
    Array,
    HostInteger,
    as_array,
    copy_into,
    current_device_of,
    module_of,
    positive,
)
from lorakit.nn.attention_step import AttentionStep
from lorakit.nn.device import DeviceRef, single_device
from lorakit.nn.dtype import DType
from lorakit.nn.kv_cache import KVCacheParams, KVCacheStrategy, KVCollection
from lorakit.nn.linear import Linear, check_clip, clipped, refuse
from lorakit.nn.module import Module, NamedWeight
from lorakit.nn.rotary_embedding import RotaryEmbedding


class AttentionWithRope(Module):
    """Causal self-attention of a ragged batch (MAX `AttentionWithRope`).

    With ``D = head_dim``, ``Q = num_attention_heads * D`` and ``KV = num_key_value_heads * D``::

        q, k, v = split(x @ wqkv.T + wqkv_bias, [Q, KV, KV])
        cache of this layer at this step's positions = rotated k, v
        y = o_proj(softmax(scale * rotated q @ cached k) @ cached v)

    Args:
        rope: Says which elements of a head form a pair; its table is passed to each call.
        num_attention_heads: Query heads; a multiple of `num_key_value_heads`.
        num_key_value_heads: Heads of the cache, as in `kv_params`.
        hidden_size: Features of input and output.
        kv_params: Geometry and dtype of the cache.
        devices: One device; None: the current GPU, else the CPU.
        dtype: float32, float16 or bfloat16, of weights, activations and cache.
        linear_cls: Makes the four projections: any callable that takes `Linear`'s keywords
            ``in_dim, out_dim, dtype, device, has_bias, float8_config`` and returns a `Linear`. The
            base product of q, k and v is one product with `wqkv`, not a call of theirs.
        stacked_qkv: Names the base weight ``qkv_proj.weight`` (and ``qkv_proj.bias``), ``[Q + 2 KV,
            hidden_size]``, of which the weights of ``q_proj``, ``k_proj``, ``v_proj`` are slices.
        scale: Multiplies the scores; None: ``D ** -0.5``; 0.0 is a value.
        has_bias: q, k, v have biases; ``o_proj`` never.
        float8_config: Not implemented.
        clip_qkv: Clamps the base weights of q, k, v to ``[-clip_qkv, clip_qkv]`` in every product;
            not biases, ``o_proj`` or adapters. None: unset; 0.0 is a value.
        window: ``(left, right)``: a token sees only the keys up to `left` positions before its own;
            None in a place or altogether: no bound. It never sees later ones, whatever `right` is.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; None leaves them.
        sinks: ``[num_attention_heads]`` on the layer's device, float32 or `dtype`: a score for each
            query head that counts in the softmax, without a value. Kept, not copied; no weight, so
            that it is not in the state dict.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: The projections, ``[Q, hidden]``, twice ``[KV, hidden]``,
            ``[hidden, Q]``.
        n_heads, q_weight_dim, kv_weight_dim: Query heads, ``Q``, ``KV``.

    Raises:
        ValueError, TypeError: A size does not fit, a cache of another dtype, a bad `scale`, clip,
            `window`, `soft_cap` or `sinks`.
        NotImplementedError: `float8_config`, or more than one device.
    """

    def __init__(
        self,
        *,
        rope: RotaryEmbedding,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[DeviceRef] | None = None,
        dtype: DType = DType.float32,
        linear_cls: Callable[..., Linear] = Linear,
        stacked_qkv: bool = False,
        scale: float | None = None,
        has_bias: bool = False,
        float8_config: Any = None,
        clip_qkv: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> None:
        refuse(float8_config=float8_config)
        self.n_heads, self.n_kv_heads, self.hidden_size = positive(
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_size=hidden_size,
        )
        self._check_geometry(kv_params, dtype)
        if not isinstance(rope, RotaryEmbedding):
            raise TypeError(f"rope must be a RotaryEmbedding, got {type(rope).__name__}")
        if scale is not None and not math.isfinite(checks.check_number(scale, "scale")):
            raise ValueError(f"scale must be None or finite, got {scale}")
        self.rope = rope
        self.kv_params = kv_params
        self.devices = [single_device(devices)]
        self.dtype = dtype
        self.stacked_qkv = stacked_qkv
        self.scale: float = kv_params.head_dim**-0.5 if scale is None else scale
        self.has_bias = has_bias
        self.float8_config = float8_config
        self.clip_qkv = check_clip(clip_qkv, "clip_qkv")
        self.window = checks.check_window(window)
        self.soft_cap = checks.check_soft_cap(soft_cap)
        self.sinks: Array | None = None
        if sinks is not None:
            self.sinks = as_array(sinks, self.devices[0], "sinks")
            checks.check_sinks(self.sinks, self.n_heads, dtype.to_numpy())
        self.q_weight_dim = kv_params.head_dim * self.n_heads
        self.kv_weight_dim = kv_params.head_dim * self.n_kv_heads

        make = _linear_maker(
            linear_cls, dtype=dtype, device=self.devices[0], float8_config=float8_config
        )
        q, kv, hidden = self.q_weight_dim, self.kv_weight_dim, self.hidden_size
        self.q_proj = make(in_dim=hidden, out_dim=q, has_bias=has_bias)
        self.k_proj = make(in_dim=hidden, out_dim=kv, has_bias=has_bias)
        self.v_proj = make(in_dim=hidden, out_dim=kv, has_bias=has_bias)
        self.o_proj = make(in_dim=q, out_dim=hidden)
        self._columns = (slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv))
        self._share_base()

    def named_weights(self) -> Iterator[NamedWeight]:
        """All weights; with `stacked_qkv` the stacked base in place of its three slices."""
        slices = [part for p in self._projections() for part in (p.weight, p.bias)]
        for weight in super().named_weights():
            if not (self.stacked_qkv and any(weight.array is part for part in slices)):
                yield weight

    # ---- The base product -----------------------------------------------------------------------

    @property
    def wqkv(self) -> Array:
        """``[Q + 2 KV, hidden]``: the base weights of q, k, v, clamped when `clip_qkv` is set.

        Without a clip it is the memory of the three weights itself; a copy only after one of the
        three ``weight`` attributes was set to another array, which `stacked_qkv` refuses.
        """
        parts = [projection.effective_weight for projection in self._projections()]
        return clipped(self._joined(parts, "weight"), self.clip_qkv)

    @property
    def wqkv_bias(self) -> Array | None:
        """``[Q + 2 KV]``: the biases of q, k, v, or None without `has_bias`."""
        if not self.has_bias:
            return None
        return self._joined([projection.bias for projection in self._projections()], "bias")

    @property
    def qkv_input_scale(self) -> None:
        """None: only float8 has one."""
        return None

    @property
    def qkv_weight_scale(self) -> Array:
        """`ValueError`: only float8 has one."""
        raise ValueError("qkv_weight_scale needs a float8_config, got None")

    # ---- The call -------------------------------------------------------------------------------

    def __call__(
        self,
        layer_idx: HostInteger,
        x: Array,
        kv_collection: KVCollection,
        freqs_cis: Array,
        input_row_offsets: Array,
    ) -> Array:
        """Run the layer, writing this step's keys and values into the cache.

        Metadata (`input_row_offsets`, ``cache_lengths``, ``lookup_table``) may be on the host or on
        the device; on the host it is checked. Nothing is written unless all checks pass.

        Args:
            layer_idx: Which layer of the cache; an integer on the host.
            x: ``[total_tokens, hidden_size]``, C-contiguous, of the layer's dtype.
            kv_collection: The cache, a `PagedKVCacheCollection` or `PagedKVCacheLayers`, with pages
                for this step.
            freqs_cis: ``[positions, rotary_dim]`` float32, as `RotaryEmbedding.freqs_cis`.
            input_row_offsets: ``[batch_size + 1]`` uint32 or int32, from 0 to total_tokens.

        Returns:
            ``[total_tokens, hidden_size]``, a new array.

        Raises:
            ValueError, TypeError: An argument does not fit; the message names it.
        """
        step = AttentionStep.checked(self, layer_idx, x, kv_collection, input_row_offsets)
        table = step.checked_table(freqs_cis, self)
        self._check_output()
        self._check_adapters(step)

        qkv = ops.linear(step.x, self.wqkv, self.wqkv_bias)
        self._add_adapters(step, qkv)
        heads = qkv.reshape(len(qkv), self.n_heads + 2 * self.n_kv_heads, self.kv_params.head_dim)
        k_at, v_at = self.n_heads, self.n_heads + self.n_kv_heads
        q, k, v = heads[:, :k_at], heads[:, k_at:v_at], heads[:, v_at:]

        where = (step.input_row_offsets, step.kv)
        q = ops.rope_store_kv(
            q,
            k,
            v,
            *where,
            table,
            step.layer_idx,
            interleaved=self.rope.interleaved,
            rotate_last=self.rope.rotate_last,
        )
        attended = ops.attention_ragged(
            q,
            *where,
            step.layer_idx,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )
        return self.o_proj(attended.reshape(len(qkv), self.q_weight_dim))

    def _check_output(self) -> None:
        """The output projection, which is used only after the cache was written."""
        name, weight = "o_proj.weight", self.o_proj.weight
        checks.check_shapes(**{name: (weight, f"{self.hidden_size} {self.q_weight_dim}")})
        checks.check_dtype((self.dtype.to_numpy(),), **{name: weight})

    def _check_adapters(self, step: AttentionStep) -> None:
        """What a subclass checks before anything is written."""

    def _add_adapters(self, step: AttentionStep, qkv: Array) -> None:
        """What a subclass adds to ``[total_tokens, Q + 2 KV]`` in place, before rotation."""

    # ---- Inside ---------------------------------------------------------------------------------

    def _projections(self) -> tuple[Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _share_base(self) -> None:
        """Move the base weights of q, k, v into one array; each projection keeps a slice."""
        self._base = Linear(
            self.hidden_size,
            self.q_weight_dim + 2 * self.kv_weight_dim,
            self.dtype,
            self.devices[0],
            self.has_bias,
        )
        if self.stacked_qkv:
            self.qkv_proj = self._base
        for projection, columns in zip(self._projections(), self._columns, strict=True):
            for name in ("weight", "bias") if self.has_bias else ("weight",):
                part = getattr(self._base, name)[columns]
                copy_into(part, getattr(projection, name))
                setattr(projection, name, part)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy or an unpickled layer: its three weights were copied apart from their base."""
        vars(self).update(state)
        if not _are_slices([p.weight for p in self._projections()], self._base.weight):
            self._share_base()

    def _joined(self, parts: Sequence[Array], name: str) -> Array:
        """The shared array while `parts` are its slices, else their concatenation."""
        shared = getattr(self._base, name)
        if _are_slices(parts, shared):
            return shared
        own = [getattr(projection, name) for projection in self._projections()]
        if self.stacked_qkv and not _are_slices(own, shared):
            raise ValueError(
                f"{name} of q_proj, k_proj and v_proj must stay slices of qkv_proj.{name}: write into "
                "them, got another array"
            )
        for part, columns, which in zip(parts, self._columns, "qkv", strict=True):
            label = f"{which}_proj.{name}"
            axes = " ".join(map(str, shared[columns].shape))
            checks.check_shapes(**{label: (part, axes)})
            checks.check_dtype((shared.dtype,), **{label: part})
        with current_device_of(parts[0]):
            return module_of(parts[0]).concatenate(parts)

    def _check_geometry(self, kv_params: KVCacheParams, dtype: DType) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads = "
                f"{self.n_kv_heads}, got {self.n_heads}"
            )
        if not isinstance(kv_params, KVCacheParams):
            raise TypeError(f"kv_params must be KVCacheParams, got {type(kv_params).__name__}")
        if kv_params.n_kv_heads != self.n_kv_heads:
            raise ValueError(
                f"num_key_value_heads must be kv_params.n_kv_heads = {kv_params.n_kv_heads}, "
                f"got {self.n_kv_heads}"
            )
        if kv_params.cache_strategy is not KVCacheStrategy.PAGED:
            raise ValueError(f"kv_params must be PAGED, got {kv_params.cache_strategy.name}")
        if kv_params.dtype is not dtype:
            raise ValueError(f"dtype must be kv_params.dtype = {kv_params.dtype}, got {dtype}")


def _are_slices(parts: Sequence[Array], whole: Array) -> bool:
    """Whether `parts` are the memory of `whole`, one after the other along the first axis."""
    address = checks.address_of(whole)
    for part in parts:
        same_rows = part.dtype == whole.dtype and part.strides == whole.strides
        if not same_rows or checks.address_of(part) != address:
            return False
        address += part.nbytes
    return address == checks.address_of(whole) + int(whole.nbytes)


def _linear_maker(linear_cls: Callable[..., Linear], **common: Any) -> Callable[..., Linear]:
    def make(**arguments: Any) -> Linear:
        projection = linear_cls(**arguments, **common)
        if not isinstance(projection, Linear):
            raise TypeError(
                f"linear_cls must return a lorakit.Linear, got {type(projection).__name__}"
            )
        wanted = (arguments["out_dim"], arguments["in_dim"])
        if projection.weight.shape != wanted or projection.dtype is not common["dtype"]:
            raise ValueError(
                f"linear_cls must return a layer of {common['dtype']} with weight {wanted}, got "
                f"{projection.dtype} with weight {projection.weight.shape}"
            )
        return projection

    return make
