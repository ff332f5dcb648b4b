"""What builds the kernels: `modules` says what, `tools` with what, `build` does it, `ptx` takes the result apart."""
