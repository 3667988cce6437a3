"""The reference's training entry point: every flag of its README, with its documented defaults."""

from __future__ import annotations

import sys

from aiether.training import train_with_hf_trainer

if __name__ == "__main__":
    sys.exit(train_with_hf_trainer().exit_status)
