"""Every test process computes on one thread: tiny models gain nothing from more, workers lose."""

import torch

torch.set_num_threads(1)
