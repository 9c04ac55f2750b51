"""What a kernel costs, counted on any machine: `python -m benchmarks.cost` prints it and renews docs/kernels.md.

traffic.py counts bytes and products while Triton interprets. resources.py compiles what the library would launch, cuda.py does
so for the kernels in CUDA C++; sass.py reads their machine code, walk.py and thread.py follow their warps through it, replay.py
estimates the time. report.py makes rows and tables of it all.
"""
