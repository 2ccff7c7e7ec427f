"""Triton kernels and their launchers, one file an op. Imported by ``ops`` when a CUDA tensor first needs them."""
