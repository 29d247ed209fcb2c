"""Serve a ragged batch on several adapters and check every step, or say what lorakit runs on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lorakit.demo.info import print_info
from lorakit.demo.run import serve
from lorakit.nn import DeviceRef, DType
from lorakit.testing import MODELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m lorakit", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "info"),
        default="serve",
        help="serve (default): run, check and time serving steps; info: versions and kernels",
    )
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: the GPU when there is one, else the CPU"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--model",
        choices=tuple(MODELS),
        help="sizes of the block; default: llama-3-8b on a GPU, tiny on a CPU",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers; default: 0")
    given = parser.parse_args(arguments)

    device = DeviceRef(given.device) if given.device else DeviceRef.current()
    if device.is_gpu() and DeviceRef.current().is_cpu():
        parser.error("--device gpu needs an NVIDIA GPU and CuPy: pip install '.[cuda12]'")
    if given.command == "info":
        return print_info(device)
    dtype = DType(given.dtype or ("bfloat16" if device.is_gpu() else "float32"))
    model = given.model or ("llama-3-8b" if device.is_gpu() else "tiny")
    return serve(device, dtype, model, given.seed)


if __name__ == "__main__":
    sys.exit(main())
