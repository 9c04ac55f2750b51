"""What a kernel costs, counted on any machine: `python -m benchmarks.cost` prints it and renews docs/kernels.md.

sass.py reads what the assembler made of a kernel, walk.py follows its warps through it, replay.py estimates its time.
"""
