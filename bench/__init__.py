"""The benchmarks that every kernel is judged by: `python -m bench --help`."""
