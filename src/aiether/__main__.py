"""`python -m aiether` is the `aiether` command."""

from __future__ import annotations

import sys

from aiether.cli import main

if __name__ == "__main__":
    sys.exit(main())
