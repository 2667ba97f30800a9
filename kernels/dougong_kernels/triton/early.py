"""Programmatic dependent launch, which NVIDIA has from Hopper on: a kernel is set up while the one before it runs.

A kernel launched so may begin early; it waits before it touches what the one before may write (all but weights), and
then lets the next one begin. As every kernel waits for the end of the one before it, whatever was enqueued earlier has
ended too.
"""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton of another vendor, or an older one: EARLY is never set there

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """In a kernel that may be launched early: before it reads what others write, and before it writes."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
