"""Triton kernels for CUDA and ROCm devices. Importing this imports neither triton nor a driver."""
