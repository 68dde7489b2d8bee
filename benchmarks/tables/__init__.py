"""Tables that are made from records: one look, one set of number formats, one way to say what was measured on what."""
