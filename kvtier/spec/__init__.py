"""Specs: a spec checks a configuration, and makes the manager and the worker for it."""
