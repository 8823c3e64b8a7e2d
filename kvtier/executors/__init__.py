"""Executors move the bytes of a tier between its store and the arena."""
