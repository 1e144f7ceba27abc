extern "C" int qkit_abi(void) { return 1; }
