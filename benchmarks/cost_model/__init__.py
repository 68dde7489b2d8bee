"""A cost model of a decode step: bytes, rates and fixed times; measured here, planned elsewhere."""
