"""KV retrieval for SGLang. Importing this package has no side effect."""

__version__ = "0.2.0"
