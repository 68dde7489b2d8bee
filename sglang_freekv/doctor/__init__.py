"""``python -m sglang_freekv.doctor``: would a server start here, or on a GPU of another size, and with what memory?"""
