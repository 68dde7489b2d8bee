"""Suites that nobody here wrote, against the server: plain SGLang beside FreeKV, with a real language model."""
