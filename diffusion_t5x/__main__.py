"""Runs `python -m diffusion_t5x`: the command `diffusion-t5x` without an installed script."""

from diffusion_t5x.command_line.main import main

if __name__ == "__main__":
    main()
