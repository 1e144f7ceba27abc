"""Static gates for Triton kernels: compile for cards that are not here, read the machine code."""
