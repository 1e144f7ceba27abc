"""The C++ kernels: a shared library with a plain C ABI (`qkit_cpu.h`), called through ctypes by `lib`."""
