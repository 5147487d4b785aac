"""Programmatic dependent launch (CUDA, from compute capability 9.0 on): a kernel may be put on the GPU while the one before it runs
out, and waits there until that one's results are in memory.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Before anything else in a kernel that may have been launched so; then the next one may come. Harmless if it was not."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
