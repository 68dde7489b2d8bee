"""Arguments: SGLang's parser, and the two ways from raw arguments to a resolved `ServerArgs`.

Names that are no fields are dropped from a namespace and refused as keywords. So ours are taken out before SGLang makes
its arguments, what FreeKV needs is preset, and the settings are attached after, to arguments that are then resolved and
checked.
"""

from __future__ import annotations

import argparse
import sys

from freekv_patches.patch import Attribute, HookType, Patch
from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.releases import release
from sglang_freekv.serving import support

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def activate() -> None:
    """Patch this process and register FreeKV's parts. The plug-in, which is above this module, puts its own here."""
    raise RuntimeError("FreeKV's flags are in, but its plug-in has not been registered")


def add_flags(result, parser):
    add_cli_args(parser)


def from_cli_args(original, cls, args):
    try:
        config, raw = take_options(vars(args))
        if config is None:
            return original(cls, args)
        server_args = original(cls, argparse.Namespace(**support.preset(raw)))
        _attach(server_args, config)
        return server_args
    except UnsupportedConfiguration as error:
        sys.exit(f"error: {error}")


def init(original, self, *args, **kwargs):
    config, raw = take_options(kwargs)
    if config is None:
        return original(self, *args, **raw)
    original(self, *args, **support.preset(raw))
    _attach(self, config)


def arguments_of_engine(original, **keywords):
    """What `sgl.Engine` makes of its keywords, where the arguments have no constructor to hook."""
    config, raw = take_options(keywords)
    if config is None:
        return original(**raw)
    server_args = original(**support.preset(raw))
    _attach(server_args, config)
    return server_args


def _attach(server_args, config):
    from freekv_patches.tokenizer_worker import FreeKVServerArgs

    release.resolve(server_args)
    support.check_resolved(release.settings_of(server_args), config)
    server_args._freekv = config
    server_args.__class__ = FreeKVServerArgs
    activate()


PATCHES = (
    Patch(
        target=f"{_SERVER_ARGS}.add_cli_args",
        kind=HookType.AFTER,
        hook=add_flags,
        signature="(parser: 'argparse.ArgumentParser')",
        reason="no registry takes flags",
        remove_when="SGLang lets plug-ins add flags",
    ),
    Patch(
        target=f"{_SERVER_ARGS}.from_cli_args",
        kind=HookType.AROUND,
        hook=from_cli_args,
        signature="(cls, args: 'argparse.Namespace')",
        reason="it drops what is not a field, and the defaults FreeKV needs must be set before it",
        remove_when="SGLang lets plug-ins add flags",
    ),
    Patch(
        target=f"{_SERVER_ARGS}.__init__",
        kind=HookType.AROUND,
        hook=init,
        signature={"0.5.17": "(self, model_path: ..."},
        reason="sgl.Engine(kv_retrieval=...) calls it with the keywords it was given",
        remove_when="0.5.17 is no longer served",
    ),
    Attribute(
        target="sglang.srt.entrypoints.engine.Engine.server_args_class",
        kind=HookType.AROUND,
        hook=arguments_of_engine,
        signature={"0.5.23": "ServerArgs"},
        reason="sgl.Engine(kv_retrieval=...) calls it with the keywords it was given, and nothing else sees them",
        remove_when="SGLang lets plug-ins add arguments",
    ),
)
