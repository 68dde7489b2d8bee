"""Forget the blocks of pages that change their owner."""

from __future__ import annotations

from freekv_kernels.tables import BlockTables, PairList


def forget_blocks(old: PairList, blocks: BlockTables) -> None:
    """Forget the blocks of pairs, in some layers: they are free, and the pairs have none.

    Parameters
    ----------
    old : PairList
        None twice, the same for all layers; those without a block are left alone.
    blocks : BlockTables, of some layers
        Updated; the freed blocks are pushed on the stack.
    """
    pairs = old.pairs[: int(old.count)]
    for layer in range(len(blocks.owner)):
        table, owner, last_used, free_blocks, num_free, _ = (x[layer] for x in blocks)
        freed = table.view(-1)[pairs]
        freed = freed[freed >= 0].long()
        free = int(num_free)
        free_blocks[free : free + len(freed)] = freed.int()
        num_free += len(freed)
        owner[freed] = -1
        last_used[freed] = -1
        table.view(-1)[pairs] = -1
