"""The phases of `benchmarks.gpu.suite`: one module each, run as a process of its own (`python -m benchmarks.gpu`)."""
