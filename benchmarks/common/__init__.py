"""What two benchmarks share: the command line, measuring in turns, spreads, and where a number comes from."""
