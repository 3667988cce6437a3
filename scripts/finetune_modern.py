"""The reference's fine-tuning entry point: the flags of its report, as a door to `aiether retrofit`."""

from __future__ import annotations

import sys

from aiether.compat.finetune_modern import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
