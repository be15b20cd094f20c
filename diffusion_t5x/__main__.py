"""`python -m diffusion_t5x`: the command `diffusion-t5x`, where it is not installed."""

from diffusion_t5x.command_line.main import main

if __name__ == "__main__":
    main()
