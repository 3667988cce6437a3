from __future__ import annotations

import gc

import aiether.training.run  # noqa: F401 - what is collected below

# Every stage of a Trainer collects garbage, and would look through all that the imports made each time.
gc.freeze()
