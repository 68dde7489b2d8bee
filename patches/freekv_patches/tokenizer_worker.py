"""Extra tokenizer processes (``--tokenizer-worker-num``). The web server starts them, and they load no plug-ins.

Each asks the server's arguments, which it unpickles, for its class, before it takes requests. So those of a FreeKV
server are of a class of ours.
"""

from __future__ import annotations

from sglang.srt.server_args import ServerArgs


class FreeKVServerArgs(ServerArgs):
    """SGLang's arguments, once `--kv-retrieval freekv` is attached to them."""

    def get_tokenizer_worker_class(self) -> type:
        """Patch the tokenizer process that asks, so that it refuses what it must.

        Raises
        ------
        SystemExit
            If a patch does not fit.
        """
        from freekv_patches.plugin import activate

        activate()
        return super().get_tokenizer_worker_class()
