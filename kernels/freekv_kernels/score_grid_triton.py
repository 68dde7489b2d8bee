"""How the programs of a scoring kernel share its rows and their columns."""

from __future__ import annotations

import triton
import triton.language as tl

NUM_PROGRAMS = 1024  # two waves of four per SM on a chip of 132 to 148, so that uneven requests even out


@triton.jit
def share_of_rows(flag_rows_ptr, flag_count_ptr, num_rows):
    """A row, which of those that share it this program is, and how many they are: a short list gets more of them.

    Programs that no row has left get a share past the last one.
    """
    num_entries = num_rows if flag_count_ptr is None else tl.load(flag_count_ptr)
    num_splits = tl.num_programs(0) // tl.maximum(num_entries, 1)
    row = tl.program_id(0) % tl.maximum(num_entries, 1)
    split = tl.program_id(0) // tl.maximum(num_entries, 1)
    if flag_rows_ptr is not None:
        row = tl.load(flag_rows_ptr + row)
    return row, split, tl.where(num_entries > 0, num_splits, 0)


@triton.jit
def load_pages(pages_ptr, page_table_ptr, column, end):
    """Host pages of some columns of a row, and which columns have one. Without a list, columns are logical pages."""
    logical, is_page = column, column < end
    if pages_ptr is not None:
        logical = tl.load(pages_ptr + column, mask=is_page, other=-1)
        is_page = logical >= 0
    return tl.load(page_table_ptr + logical, mask=is_page, other=0), is_page
