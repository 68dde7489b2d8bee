"""What the device cache is sized by: hits against blocks, and how far a claim has to look."""
