"""Runs `diffusion-t5x ar2diff`."""

import sys

from diffusion_t5x.command_line import config

if __name__ == "__main__":
    with config.program():
        from diffusion_t5x.ar2diff.command import parse

        command, only_plan = parse(sys.argv[1:])  # a wrong flag need not wait for what does the work

        from diffusion_t5x.ar2diff.stages import convert

        convert(command, only_plan)
