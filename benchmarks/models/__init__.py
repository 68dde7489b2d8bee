"""Models that FreeKV serves: what each of them does on plain SGLang and on FreeKV."""
