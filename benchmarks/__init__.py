"""One folder a benchmark, run as `python -m benchmarks.NAME` from the repository's root. README.md tells of each."""
