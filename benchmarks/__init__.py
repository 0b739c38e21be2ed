"""Speed and memory of this project beside the plain way of doing the same: `python -m benchmarks`."""
