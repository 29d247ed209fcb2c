"""Other libraries' LoRA kernels on the same arrays, where they can be imported: SGLang's and vLLM's.

They need torch, Triton and a GPU. Nothing of them is here: put them on ``PYTHONPATH``.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 7


class Weights:
    """One copy of the weights of a case, and what is added to, as torch tensors.

    Args:
        lora_a: A CuPy array ``[slots, rank, in_dim]`` for each slice.
        lora_b: ``[slots, out_dim, rank]`` for each slice; copied, as peers want it contiguous.
        total_tokens: Rows of y, which is filled by random numbers.
    """

    def __init__(self, lora_a: Sequence[Any], lora_b: Sequence[Any], total_tokens: int) -> None:
        import torch

        self.a = [torch.from_dlpack(a) for a in lora_a]
        self.b = [torch.from_dlpack(b.transpose(0, 2, 1)).mT.contiguous() for b in lora_b]
        self.a_all, self.b_all = torch.cat(self.a, 1), torch.cat(self.b, 1)
        width = self.b_all.shape[1]
        self.y = torch.randn(total_tokens, width, device="cuda", dtype=self.a_all.dtype)


Peer = Callable[
    [Any, Sequence[Weights], NDArray[np.int32], NDArray[np.int32]], list[Callable[[], None]]
]


def sglang_triton(
    x: Any, weights: Sequence[Weights], slots: NDArray[np.int32], ranks: NDArray[np.int32]
) -> list[Callable[[], None]]:
    """SGLang's ``triton_v2`` runner, routes made once."""
    import torch
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.dense.runner import DenseLoraRunner
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    total_tokens, in_dim = x.shape
    rank, out_dim = weights[0].a[0].shape[1], weights[0].b_all.shape[1]
    runner = DenseLoraRunner(LoraWorkspace(), max_loras=len(ranks), device=torch.device("cuda", 0))
    runner.begin_batch(
        token_slots=torch.from_numpy(slots).cuda(),
        lora_ranks=torch.from_numpy(ranks).cuda(),
        scalings=torch.ones(len(ranks), device="cuda"),
        num_tokens=total_tokens,
        phase=Phase.DECODE if total_tokens <= 256 else Phase.PREFILL,
        graph_mode=True,
    )
    plan = runner.plan_for(DenseLoraKind.LINEAR, rank, in_dim, out_dim, num_tokens=total_tokens)
    ends = np.cumsum([0, *(b.shape[1] for b in weights[0].b)])
    offsets = tuple(int(end) for end in ends)

    def call(of: Weights) -> None:
        bridge = runner.run_a(x, of.a_all, stack=len(of.a), plan=plan)
        runner.run_b(bridge, of.b_all, of.y, offsets=offsets, plan=plan)

    return [partial(call, of) for of in weights]


def vllm(
    x: Any, weights: Sequence[Weights], slots: NDArray[np.int32], ranks: NDArray[np.int32]
) -> list[Callable[[], None]]:
    """vLLM's shrink and expand, metadata made once."""
    import torch
    from vllm.lora.ops.triton_ops import utils
    from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

    for tables in (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT):
        tables.clear()  # by address, which may be another array's by now
    total_tokens, rank = len(x), weights[0].a[0].shape[1]
    meta = LoRAKernelMeta.make(len(ranks), total_tokens, "cuda")
    meta.prepare_tensors(torch.from_numpy(slots).cuda())
    h = torch.empty(len(weights[0].a), total_tokens, rank, device="cuda", dtype=torch.float32)

    def call(of: Weights) -> None:
        _lora_shrink(x, of.a, h, *meta.meta_args(total_tokens, True), 1.0)
        _lora_expand(h, of.b, of.y, *meta.meta_args(total_tokens, True), 0, True)

    return [partial(call, of) for of in weights]


PEERS: dict[str, Peer] = {"SGLang": sglang_triton, "vLLM": vllm}


def times(
    x: Any,
    lora_a: Sequence[Sequence[Any]],
    lora_b: Sequence[Sequence[Any]],
    calls: int,
    slots: NDArray[np.int32],
    ranks: NDArray[np.int32],
) -> dict[str, float]:
    """Seconds of a call of each peer that can be imported, in a graph of many calls, weights in turn.

    Args:
        x: A CuPy array ``[total_tokens, in_dim]``.
        lora_a, lora_b: For each copy of the weights the arrays of all slices.
        calls: How many calls the graph has.
        slots: ``[total_tokens]``, the slot of each row; -1 is the base model.
        ranks: ``[max_num_loras]``, the true rank of each slot.
    """
    found: dict[str, float] = {}
    with contextlib.suppress(ImportError), _side_stream() as torch:
        weights = [Weights(a, b, len(x)) for a, b in zip(lora_a, lora_b, strict=True)]
        rows = torch.from_dlpack(x)
        for name, peer in PEERS.items():
            with contextlib.suppress(ImportError):
                found[name] = _graph_seconds(torch, peer(rows, weights, slots, ranks), calls)
    return found


@contextlib.contextmanager
def _side_stream() -> Iterator[Any]:
    import torch

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield torch
    torch.cuda.synchronize()


def _graph_seconds(torch: Any, calls: Sequence[Callable[[], None]], count: int) -> float:
    for call in calls:  # compiles, and makes tables of pointers; on the stream that captures
        call()
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    rounds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / count)
    return float(statistics.median(rounds))
