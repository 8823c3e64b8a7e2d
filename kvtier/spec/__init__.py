"""Specs: validated configuration that makes a manager and a worker."""
