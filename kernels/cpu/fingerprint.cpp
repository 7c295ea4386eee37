// The hash of the sources that this library was built from, so that a stale build is recognised.

#include "instruction_set.h"

extern "C" MEGACPT_EXPORT const char* megacpt_fingerprint() { return MEGACPT_FINGERPRINT; }
