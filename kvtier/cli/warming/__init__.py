"""How `kvtier warm` copies blocks from one tier to another."""
