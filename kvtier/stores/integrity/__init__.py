"""Integrity of stored blocks: what is read is what was stored, or a miss."""
