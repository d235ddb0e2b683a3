"""Benchmarks of the daemons on the real kernel: ``make bench`` or ``python -m bench --help``."""
