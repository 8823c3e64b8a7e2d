"""Helps to test stores, tiers and policies, and is shipped with kvtier: conformance suites, faulty stores, a clock."""
