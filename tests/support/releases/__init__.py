"""What tests make of SGLang that tested releases shape differently: `of_release` is the module of the installed one."""

from __future__ import annotations

from sglang_freekv.tested_release import module_for_release

of_release = module_for_release(__name__)
