"""Recordings of an engine's calls to its manager: their format, writer, reader and recorder."""
