"""Programs of SGLang's frontend language, on plain SGLang and on FreeKV."""
