// Which sources this library was built from, and for which devices; the build says both.
#include "device.cuh"

MEGACPT_EXPORT const char* megacpt_cuda_fingerprint() { return MEGACPT_FINGERPRINT; }
MEGACPT_EXPORT const char* megacpt_cuda_architectures() { return MEGACPT_ARCHITECTURES; }
