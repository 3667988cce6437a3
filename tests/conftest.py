"""Every test process computes on one thread: tiny models gain nothing from more, and parallel workers lose."""

import torch

torch.set_num_threads(1)
