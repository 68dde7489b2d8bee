"""What a platform says of its pools and its abilities: one module for each release of SGLang."""
