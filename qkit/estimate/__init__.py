"""What a model takes, by formula: weights as a format stores them (`weights`), the KV cache as an engine holds it
(`cache`). Neither torch nor a tensor is needed."""
