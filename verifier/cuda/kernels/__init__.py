"""Triton kernels: each does what a few lines of torch do, in one launch; the torch lines stay as its oracle.

Nothing here is imported unless the Triton back end is chosen. With TRITON_INTERPRET=1 in the environment before the
first import, Triton runs the same kernels on a CPU: slow, for tests.
"""

OPTIONS = {"enable_fp_fusion": True}
"""For every launch: what a version of Triton does when it is not told differs from one to the next."""
