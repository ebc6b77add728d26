"""The back end of a CPU: attention and products in C++."""
