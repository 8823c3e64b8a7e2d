"""Recordings of what an engine asks of its manager: format, writer, reader, recorder."""
