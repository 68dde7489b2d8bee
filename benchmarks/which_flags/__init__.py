"""Which model, GPU and context want which flags, by the doctor: docs/which_flags.md."""
