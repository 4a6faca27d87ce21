"""What several benchmarks share: the command line, interleaved measurements, spreads, and provenance."""
