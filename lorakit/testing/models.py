"""Sizes of one attention layer of known models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder layer."""

    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int

    @property
    def q_dim(self) -> int:
        """Width of the queries of a token."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values, of a token."""
        return self.n_kv_heads * self.head_dim


MODELS: dict[str, ModelShape] = {
    "llama-3-8b": ModelShape(4096, 32, 8, 128, 14336),
    "llama-3-70b": ModelShape(8192, 64, 8, 128, 28672),
    "llama-3.2-1b": ModelShape(2048, 32, 8, 64, 8192),
    "llama-2-7b": ModelShape(4096, 32, 32, 128, 11008),
    "gemma-2-9b": ModelShape(3584, 16, 8, 256, 14336),
    "qwen2-7b": ModelShape(3584, 28, 4, 128, 18944),
    "mistral-7b": ModelShape(4096, 32, 8, 128, 14336),
    # Small enough for a CPU, and no size equals another: q_dim is not hidden_size.
    "tiny": ModelShape(80, 6, 2, 16, 208),
}
