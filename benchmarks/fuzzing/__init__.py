"""What `benchmarks/fuzz.py` is made of: mutations of files that are in order, targets that read them, and the loop."""
