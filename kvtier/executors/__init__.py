"""Executors: who moves the bytes of a tier, between a store and the arena."""
