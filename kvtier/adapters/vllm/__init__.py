"""kvtier inside unmodified vLLM: a plug-in for its offloading connector, on its base classes only.

vLLM's word for a block is chunk; it appears in this folder only, where vLLM's names demand it.
"""
