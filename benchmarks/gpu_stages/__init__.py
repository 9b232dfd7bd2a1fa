"""The stages of the GPU examination (``benchmarks/gpu.py``). Each module has ``run(stage)`` and adds cases to its stage."""
