"""Scripts that measure; `python -m benchmarks.NAME --help`. Results are kept in `results/`."""
