"""Selectors of others, to compare with in the same engine: a file each, with its source and what differs here."""
