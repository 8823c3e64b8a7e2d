"""What `kvtier top` reads from an engine, and how it shows it."""
