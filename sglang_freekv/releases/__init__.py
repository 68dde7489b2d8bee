"""What releases of SGLang name differently: `release` is the module of the installed one."""

from __future__ import annotations

from sglang_freekv.tested_release import module_for_release

release = module_for_release(__name__)
