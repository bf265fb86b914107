"""The own GPU kernels in Triton, and the layout that they share with the CUDA one.

So far they have run in Triton's interpreter and been compiled for compute capabilities 8.0 and 9.0; `tests/gpu` is for the first card.
"""
