"""Deliberate errors in the CUDA sources, for test_cuda_breaks.py. Each is text that stands there once, and what replaces it.

A change of the kernels that moves such a text makes the test say so: put the break where the text went.
"""

from typing import NamedTuple


class Break(NamedTuple):
    kernel: str  # forward or backward: whose library is built from the broken sources
    what: str
    old: str
    new: str
