"""Recordings of an engine's calls to its manager: format, writer, reader and recorder."""
