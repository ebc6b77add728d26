"""The back end of a GPU: Triton kernels, compiled layers, recorded steps."""
