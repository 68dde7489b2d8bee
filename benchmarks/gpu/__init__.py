"""The phases of `benchmarks.gpu_suite`: one module each, run as a process of its own (`python -m benchmarks.gpu`)."""
