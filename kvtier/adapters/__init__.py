"""Adapters to engines: vLLM, transformers, and workers for torch tensors."""
