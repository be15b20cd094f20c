"""diffusion_t5x: language models that write by diffusion, trained and run in the T5X manner."""

__version__ = "0.1.0"
