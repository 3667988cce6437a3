"""`aiether COMMAND ...`: finds the command, and turns a user's mistake into one line and exit status 2.

Only the standard library is imported here; a command's own imports (torch among them) wait until it runs.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aiether import __version__

COMMANDS = {
    "train": "train a model that grows when the geometry of its weights says so, or resume a run",
    "generate": "continue a prompt with the model of a run or of any Hugging Face folder",
    "evaluate": "measure a model's loss on a text, or check that it is causal and its cache right",
    "halting": "teach a finished model's halting head which tokens gain by more iterations",
    "inspect": "measure the path of the weights through a series of anyone's checkpoints",
    "grow": "grow anyone's checkpoint into a deeper one, larger than memory or not",
    "retrofit": "give layers of a trained model toroidal attention, without losing what it knows",
    "report": "write a run's report.html anew",
    "study": "conditions x seeds under one budget: run, watch, report and compare studies",
    "triggers": "when each trigger would have grown a recorded run, and thresholds from its own history",
}
"""Each command is the module `aiether.cli.<name>` with `run(arguments) -> exit status`."""

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done; 2: a mistake to correct; 3: a fault stopped a run in the middle; 130 or 143: a signal ended it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"aiether {__version__}")
        return 0
    return run_command(arguments[0], arguments[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command by name with its own arguments."""
    try:
        with one_line_errors(f"aiether {name}"):
            if name not in COMMANDS:
                near = difflib.get_close_matches(name, COMMANDS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
                raise ValueError(f"unknown command {name!r}; {hint}")
            return importlib.import_module(f"aiether.cli.{name}").run(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USER_ERROR


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Report mistakes (ValueError, OSError: exit 2), faults and interrupts as one line.

    AIETHER_TRACEBACK=1 shows where mistakes and faults arose.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"{program}: {stop if str(stop) else 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(stop, "exit_status", INTERRUPTED)) from None
    except (ValueError, OSError, RuntimeError) as error:
        mistake = isinstance(error, (ValueError, OSError))
        status = getattr(error, "exit_status", USER_ERROR if mistake else None)  # a RunFault has its own
        if status is None or os.environ.get("AIETHER_TRACEBACK") == "1":
            raise
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(status) from None


def overview() -> str:
    """What `aiether --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: aiether COMMAND [flags]",
            "",
            "Train transformers whose depth is a decision: start small, grow when it pays.",
            "",
            "commands:",
            *lines,
            "",
            "aiether COMMAND --help lists a command's flags; aiether --version prints the version.",
        ]
    )
