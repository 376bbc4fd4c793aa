"""gradmill's benchmarks: `python bench/run.py`, or `pytest bench --benchmark-only` for the same cases."""
