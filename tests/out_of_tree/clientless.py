"""A module that an I/O process cannot import."""

raise ImportError("no client here")
