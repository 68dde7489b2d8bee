"""Hooks on SGLang as data, one module per hooked subsystem. ``python -m freekv_patches`` prints them."""
