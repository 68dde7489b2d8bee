"""Decode of real text under retrieval, beside full attention, by a model that nobody trained for it."""
