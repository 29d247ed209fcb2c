"""The loop of the main job: run a step, check it, time it, print a row."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit import check_errors
from lorakit.demo import clock
from lorakit.demo.block import Activations, DecoderBlock
from lorakit.demo.checks import Check, Checker
from lorakit.demo.info import environment
from lorakit.demo.oracle import StepOnHost
from lorakit.demo.weights import random_weights
from lorakit.demo.workload import (
    LARGE,
    MAX_BATCH_SIZE,
    SMALL,
    STEPS,
    Request,
    Step,
    Workload,
    batch_name,
)
from lorakit.errors import DeviceValueError
from lorakit.graph import Graph
from lorakit.nn import DeviceRef, DType, PagedKVCacheManager, build_lora_batch
from lorakit.nn.arrays import upload
from lorakit.testing import MODELS, assert_bitwise_equal, row_offsets, to_host, widen

_ROUNDS = {"cpu": 3, "gpu": 9}
_HEADER = (
    f"{'step':<4} {'batch (request:slot)':<24} {'rows':>5} {'keys':>6} {'error':>8}"
    f" {'ref.':>6} {'merged':>6} {'mlp':>6} {'eager':>9} {'graph':>9} {'tokens/s':>9}"
)
_LEGEND = (
    "error: |got - exact| / |exact| of the attention layer. ref., merged, mlp: the largest share of\n"
    "its error budget that an element used, in attention against the references and against merged\n"
    "weights W + scaling * B A, in the MLP against both; all in float64. FAIL is above 100 %.\n"
    "Times are medians of this one block; tokens/s takes the better one."
)


def serve(device: DeviceRef, dtype: DType, model: str, seed: int = 0) -> int:
    """Serve all steps of the workload and print the table.

    Args:
        device: Where the layers run.
        dtype: Of weights, activations and cache.
        model: A name in `lorakit.testing.MODELS`.
        seed: Of all random numbers.

    Returns:
        0 if all checks passed, else 1.
    """
    started = time.perf_counter()
    shape = MODELS[model]
    work = SMALL if shape.hidden_size < 1024 else LARGE
    print("; ".join(f"{name} {value}" for name, value in environment(device).items()))
    print(
        f"one block of {model}: hidden {shape.hidden_size}, {shape.n_heads} heads on "
        f"{shape.n_kv_heads} of {shape.head_dim}, MLP {shape.intermediate_size}; {dtype.value}"
    )
    server = Server(device, dtype, model, work, np.random.default_rng(seed))
    adapters = enumerate(server.weights.adapters)
    print("; ".join(f"slot {s}: rank {a.rank}, scaling {a.scaling:g}" for s, a in adapters))
    print(f"{work.num_pages} pages of {work.page_size} tokens\n\n{_HEADER}", flush=True)

    failed = count = 0
    for number, step in enumerate(STEPS):
        report = server.step(step)
        print(report.line(number), flush=True)
        count += len(report.checks)
        for check in report.checks:
            if check.problem:
                failed += 1
                print(f"  FAILED {check.name}: {check.problem}", file=sys.stderr)
    print(f"\n{_LEGEND}\n")
    verdict = f"{failed} of {count} checks FAILED" if failed else f"all {count} checks passed"
    print(f"{verdict}, in {time.perf_counter() - started:.1f} s with weights, checks and timing")
    return 1 if failed else 0


@dataclass(frozen=True)
class StepReport:
    """A row of the table."""

    batch: str
    rows: int
    keys: int
    checks: list[Check]
    error: float
    eager: float
    graph: float | None

    def line(self, number: int) -> str:
        """The row."""
        best = self.eager if self.graph is None else min(self.eager, self.graph)
        shares = (self._share("attention, ref"), self._share("attention, mer"), self._share("mlp"))
        return (
            f"{number:<4} {self.batch:<24} {self.rows:>5} {self.keys:>6} {self.error:>8.1e}"
            f" {shares[0]:>6} {shares[1]:>6} {shares[2]:>6} {_milliseconds(self.eager):>9}"
            f" {_milliseconds(self.graph):>9} {self.rows / best:>9.0f}"
        )

    def _share(self, start: str) -> str:
        share = max(check.share for check in self.checks if check.name.startswith(start))
        return "FAIL" if share > 1 else f"{share:.1%}"


class Server:
    """A decoder block, its cache, and requests that come and go.

    Args:
        device, dtype, model: As in `serve`.
        work: Requests and cache geometry.
        rng: All random numbers.
    """

    def __init__(
        self,
        device: DeviceRef,
        dtype: DType,
        model: str,
        work: Workload,
        rng: np.random.Generator,
    ) -> None:
        self.device = device
        self.rng = rng
        self.weights = random_weights(MODELS[model], dtype.to_numpy(), rng)
        self.block = DecoderBlock(self.weights, device, work.page_size, work.max_seq_len)
        shape = self.weights.shape
        page_bytes = 2 * work.page_size * shape.kv_dim * self.weights.dtype.itemsize
        self.manager = PagedKVCacheManager(
            self.block.kv_params,
            MAX_BATCH_SIZE,
            work.max_seq_len,
            1,
            [device],
            work.num_pages * page_bytes,
            work.page_size,
            enable_runtime_checks=True,
        )
        self.checker = Checker(
            self.weights,
            to_host(self.block.rope.freqs_cis),
            self.manager.num_pages,
            work.page_size,
            rng,
        )
        self._known = work.requests()
        self._running: list[Request] = []
        self._next_rows: dict[str, np.ndarray[Any, Any]] = {}

    def step(self, step: Step) -> StepReport:
        """Let requests leave and join, run the block on the batch, check and time it."""
        self._change(step)
        batch, names = self._running, [request.name for request in self._running]
        x = np.concatenate([self._next_rows[name] for name in names])
        lengths = [len(self._next_rows[name]) for name in names]
        offsets = row_offsets(lengths)
        ranks = [adapter.rank for adapter in self.weights.adapters]
        lora = build_lora_batch([request.slot for request in batch], offsets, ranks)

        kv = self.manager.fetch(names, lengths)
        self.block.set_lora_batch(lora)
        arguments = (upload(x, self.device), kv, upload(offsets, self.device))
        got = self.block(*arguments)
        on_host = StepOnHost(
            batch,
            widen(to_host(got.attention_in)),
            offsets,
            to_host(kv.cache_lengths),
            to_host(kv.lookup_table),
            (lora.lora_ids, lora.lora_ranks, lora.lora_grouped_offsets),
        )
        checks, error = self.checker.step(on_host, got)
        checks.append(_device_values())

        rounds = _ROUNDS[str(self.device.device_type)]
        eager = clock.median_seconds(lambda: self.block(*arguments), self.device, rounds)
        replayed = None
        if self.device.is_gpu():
            replayed, check = self._replayed(arguments, got, rounds)
            checks.append(check)

        self.manager.step(names)
        y = to_host(got.y)
        for i, name in enumerate(names):
            self._next_rows[name] = y[on_host.rows(i)][-1:]
        keys = int(kv.max_lengths[0, 1])
        return StepReport(batch_name(batch), len(x), keys, checks, error, eager, replayed)

    def _change(self, step: Step) -> None:
        for name in step.leaves:
            self.manager.release(name)
            self.checker.release(name)
            self._running.remove(self._known[name])
        for name in step.joins:
            request = self._known[name]
            self.manager.claim(name)
            self._running.append(request)
            prompt = self.rng.standard_normal((request.prompt, self.weights.shape.hidden_size))
            self._next_rows[name] = prompt.astype(self.weights.dtype)

    def _replayed(
        self, arguments: tuple[Any, ...], eager: Activations, rounds: int
    ) -> tuple[float, Check]:
        """Capture the step; its time, and whether a replay gives the bits of the eager run."""
        with Graph() as captured:
            again = self.block(*arguments)
        captured.replay()
        try:
            assert_bitwise_equal(again.y, eager.y)
            check = Check("replay, eager", 0.0)
        except AssertionError as error:
            check = Check("replay, eager", float("inf"), str(error))
        return clock.median_seconds(captured.replay, self.device, rounds), check


def _device_values() -> Check:
    """The device's error word."""
    try:
        check_errors()
    except DeviceValueError as error:
        return Check("device values", float("inf"), str(error))
    return Check("device values", 0.0)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"
