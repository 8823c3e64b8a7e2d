"""Plug-in for the offloading connector of unmodified vLLM; it uses only vLLM's base classes.

vLLM calls an offloaded block a chunk. kvtier uses that word only in this folder, and only where a name of vLLM has it.
"""
