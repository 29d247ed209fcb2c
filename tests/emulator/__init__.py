"""Runs lorakit's CUDA sources on the CPU, to check them where there is no GPU. See README.md."""

from __future__ import annotations

from tests.emulator.backend import SCHEDULES, EmulatedArray, Emulator, emulator
from tests.emulator.build import EmulatorError

__all__ = ["SCHEDULES", "EmulatedArray", "Emulator", "EmulatorError", "emulator"]
