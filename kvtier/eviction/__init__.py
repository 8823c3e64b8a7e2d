"""Eviction policies: one a file, pure."""
