"""``python -m edgepipe`` is ``edgepipe``."""

import sys

from edgepipe.cli import program

sys.exit(program())
