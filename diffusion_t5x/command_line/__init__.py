"""The command `diffusion-t5x`: its verbs, their flags and help, without importing what does the work."""
