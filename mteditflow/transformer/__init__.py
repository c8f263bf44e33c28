"""What is put into a diffusers transformer: adapters, the precision of its base, kernels, compiled blocks."""
