"""Triton kernels. Nothing is imported here, so that a program compiles only what it uses."""
