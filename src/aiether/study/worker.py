"""A process that runs cells one after the other: `python -m aiether.study.worker`.

It reads one JSON object a line from its standard input ({"folder", "settings", "keep_models"}) and answers
each with one on its standard output ({"status", "reason"}). When its input ends, because whoever started it
is done or dead, it ends at once, in the middle of a run too: nobody would count that run, and the next
process must find the folder free. A run cut so goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints must not end up among the answers
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()

    from aiether.study.cell import run_cell
    from aiether.study.warm import Warmth

    warmth = Warmth()
    while True:
        order = orders.get()
        folder, keep_models = Path(order["folder"]), order["keep_models"]
        outcome = run_cell(folder, order["settings"], keep_models=keep_models, warmth=warmth)
        print(json.dumps({"status": outcome.status, "reason": outcome.reason}), file=answers, flush=True)


def _read(orders: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
