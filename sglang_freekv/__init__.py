"""KV retrieval for SGLang. Importing this package has no side effect."""

__version__ = "0.1.0"
