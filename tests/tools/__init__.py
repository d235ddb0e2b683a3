"""Tools of the tests and benchmarks: small C programs and what builds them."""
