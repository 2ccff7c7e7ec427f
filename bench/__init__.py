"""Benchmarks, the demo and the tools for kernels on GPUs. Nothing here is in the wheel."""
