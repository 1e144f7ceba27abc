"""What `benchmarks/faults.py` converts, and how things go wrong in it."""
