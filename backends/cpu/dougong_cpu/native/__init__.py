"""C++ sources of the kernels; the built library lies beside them."""
