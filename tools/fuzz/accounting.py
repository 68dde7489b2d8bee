"""Who owns which page: nobody, the radix tree, or one running request alone. SGLang's structures are only read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode

from tools.fuzz.setups import PAGE_SIZE
from tools.fuzz.texts import Text, hash_of_tenant, prefix_hashes

if TYPE_CHECKING:
    from tools.fuzz.scheduler import Life, Scheduler


class Entry(NamedTuple):
    """A node of the tree."""

    node: TreeNode
    slots: np.ndarray
    hashes: np.ndarray  # of its tokens


def entries(tree: RadixCache) -> Iterator[Entry]:
    """Every node but the root."""
    stack = [(child, None) for child in tree.root_node.children.values()]
    while stack:
        node, before = stack.pop()
        if before is None:
            before = hash_of_tenant(node.key.extra_key)
        hashes = prefix_hashes(before, node.key.token_ids.tobytes())
        yield Entry(node, node.value.numpy(), hashes)
        stack += [(child, int(hashes[-1])) for child in node.children.values()]


def longest_prefix(tree: RadixCache, text: Text, num_tokens: int) -> int:
    """Tokens of full pages that the tree has of the first `num_tokens` of a text."""
    known = {last for entry in entries(tree) for last in entry.hashes[PAGE_SIZE - 1 :: PAGE_SIZE].tolist()}
    length = 0
    while length + PAGE_SIZE <= num_tokens and int(text.hashes[length + PAGE_SIZE - 1]) in known:
        length += PAGE_SIZE
    return length


def check_accounting(scheduler: Scheduler) -> None:
    """No page is owned twice or by nobody, a shared prefix is stored once, and locks are those of running requests."""
    tree, content = scheduler.tree, scheduler.ledger.content
    locks = Counter(node for life in scheduler.active for node in _path(life))
    owned, prefixes, tokens = [scheduler.allocator.free_pages.numpy()], [], Counter()
    leaves = set()
    for node, slots, hashes in entries(tree):
        assert len(slots) == len(hashes), "tree: a node has other slots than tokens"
        owned.append(_whole_pages(slots, "tree"))
        assert len(owned[-1]) * PAGE_SIZE == len(slots), "tree: a page that is not full is shared"
        prefixes.append(hashes[PAGE_SIZE - 1 :: PAGE_SIZE])
        if not scheduler.in_flight:
            assert np.array_equal(content[slots], hashes), "tree: a page holds other tokens than its node says"
        assert node.lock_ref == locks[node], f"tree: {node.lock_ref} locks on a node that {locks[node]} requests use"
        tokens[node.lock_ref > 0] += len(slots)
        if node.lock_ref == 0 and not node.children:
            leaves.add(node)
    assert tree.evictable_leaves == leaves, "tree: what may be evicted is not its unlocked leaves"
    assert (tree.evictable_size(), tree.protected_size()) == (tokens[False], tokens[True]), "tree: wrong sizes"
    all_prefixes = np.concatenate(prefixes) if prefixes else np.empty(0)
    assert len(np.unique(all_prefixes)) == len(all_prefixes), "tree: a prefix is stored twice"
    owned += [_private_pages(scheduler, life) for life in scheduler.active]
    _check_owners(np.concatenate(owned), scheduler.allocator.num_pages)
    rows = [life.req.req_pool_idx for life in scheduler.active] + scheduler.rows.free_slots
    assert sorted(rows) == list(range(1, scheduler.setup.max_requests + 1)), (
        "request table: a row is lost, or used twice"
    )


def _path(life: Life) -> Iterator[TreeNode]:
    node = life.req.last_node
    while node.parent is not None:
        yield node
        node = node.parent


def _private_pages(scheduler: Scheduler, life: Life) -> np.ndarray:
    """A running request's pages but for those that it shares with the tree, which its last node says."""
    slots = scheduler.rows.req_to_token.numpy()[life.req.req_pool_idx, : life.length]
    pages = _whole_pages(slots, "request")
    shared = [node.value.numpy() for node in _path(life)][::-1]
    shared = np.concatenate(shared) if shared else slots[:0]
    assert len(shared) == life.req.cache_protected_len, "request: shares other tokens than it has locked"
    assert np.array_equal(slots[: len(shared)], shared), "request: its shared pages are not those of the tree"
    if not scheduler.in_flight:
        expected = life.text.hashes[: life.length]
        assert np.array_equal(scheduler.ledger.content[slots], expected), (
            "request: a page holds other tokens than its own"
        )
    return pages[len(shared) // PAGE_SIZE :]


def _whole_pages(slots: np.ndarray, owner: str) -> np.ndarray:
    """The pages of a run of tokens, which must lie in them in order."""
    pages = slots[::PAGE_SIZE] // PAGE_SIZE
    in_order = (pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)[: len(slots)]
    assert np.array_equal(slots, in_order), f"{owner}: tokens of a page are not in order"
    return pages


def _check_owners(owned: np.ndarray, num_pages: int) -> None:
    count = np.bincount(owned, minlength=num_pages + 1)
    assert count[0] == 0, "host store: the padding page was handed out"
    twice, lost = (count > 1).nonzero()[0].tolist(), (count[1:] == 0).nonzero()[0] + 1
    assert not twice, f"host store: pages {twice} are owned twice"
    assert not len(lost), f"host store: pages {lost.tolist()} have leaked"
