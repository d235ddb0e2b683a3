"""Tests of the suite; the helpers below ``tools`` also serve the benchmarks."""
