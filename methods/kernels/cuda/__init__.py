"""The own CUDA C++ kernel for 4-bit weights and few rows of inputs: its source, how it is compiled, and who may use it.

So far it has been compiled for compute capabilities 8.0, 8.9 and 9.0 and run in emulation on a CPU; `tests/gpu` is for the first card.
"""
