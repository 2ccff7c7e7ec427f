"""What compilers make of the GPU kernels, and what a GPU makes of them."""
