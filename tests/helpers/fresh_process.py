"""Verbs run in a fresh process, and what that process imported of the libraries that take seconds."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
from diffusion_t5x import {verb}
for arguments in json.loads(sys.argv.pop()):
    try:
        {verb}.main(arguments)
    except SystemExit as ended:
        assert ended.code in {codes}, ended.code
print(*sorted(sys.modules.keys() & {watched}))
"""
SECONDS = {"tensorflow", "seqio", "t5", "tensorflow_datasets"}
"""Libraries that take seconds to import."""


def run(verb, commands, codes, folder, watched=SECONDS):
    """Runs a verb several times in a fresh process: which of these libraries it imported, and what it said."""
    program = PROGRAM.format(verb=verb, codes=codes, watched=watched)
    given = json.dumps([command.split() for command in commands])
    done = subprocess.run([sys.executable, "-c", program, given], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr
