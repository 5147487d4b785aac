// The library as a whole: its version. The choice among instruction sets will be made here too.
#include "dispatch.h"

// Raised whenever the signature or the meaning of an exported symbol changes; kernels/native.py holds the same number.
LDMRT_EXPORT std::int32_t ldmrt_abi_version() { return 1; }
