"""kvtier keeps the KV cache of language models alive in host memory, on disk and beyond."""
