"""A model in an engine (qkit, vLLM, llama.cpp), over batch sizes and contexts, in the engine's own process."""
