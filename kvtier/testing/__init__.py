"""Shipped with kvtier: conformance suites, faults and a clock for tests."""
