"""Benchmarks: python -m fasfx.tools.bench."""
