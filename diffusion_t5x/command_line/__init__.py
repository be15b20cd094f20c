"""The command `diffusion-t5x`: verbs, flags and help, without importing the modules that do the work."""
