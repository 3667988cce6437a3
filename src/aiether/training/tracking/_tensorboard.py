"""TensorBoard: event files in the run folder, one folder an arm."""

from __future__ import annotations

from ._rows import Entry, flat
from ._tracking import TrackedRun


class TensorBoard:
    """Writes run_dir/tensorboard/ARM.

    Going on with a run, the event files of the processes before are replaced: they may end short of the
    records or go beyond the checkpoint. A mark at the head of the new file tells a TensorBoard that has read
    them to forget them.
    """

    first_step = 0

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.where = f"tensorboard --logdir {run.run_dir / 'tensorboard'}"
        folder = run.run_dir / "tensorboard" / run.arm
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=0)
        for summary in hparams(dict(flat(run.settings)), {"eval/loss": None, "eval/bits_per_byte": None}):
            self.writer._get_file_writer().add_summary(summary)  # its add_hparams makes a run of its own
        self.writer.flush()

    def log(self, entry: Entry) -> None:
        for name, value in entry.values.items():
            self.writer.add_scalar(name, value, entry.step)
        for name, text in entry.texts.items():
            self.writer.add_text(name, _verbatim(text), entry.step)
        if "eval/loss" in entry.values:
            self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


def _verbatim(text: str) -> str:
    """Indented: TensorBoard reads Markdown, in which a model's text would run together."""
    return "\n".join(f"    {line}" for line in text.splitlines())
