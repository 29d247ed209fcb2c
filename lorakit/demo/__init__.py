"""The main job, ``python -m lorakit``: serve a ragged batch on several adapters; check each step.

weights     random weights of one decoder block and of its adapters, on the host
block       the block from lorakit's layers, on a CPU or a GPU
workload    which requests join and leave when
oracle      the same block in float64, twice: on the references, and on merged weights
checks      a step's results against both, each within its error budget
run         the loop: run, check, time, print
info        versions, device and kernel instances
"""
