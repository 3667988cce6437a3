"""Growth in an Accelerate loop with gradient accumulation: the unwrapped model grows, the wrappers stay."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

import aiether

UPDATES, GROW_AT, ACCUMULATION = 40, 20, 2


def main() -> tuple[GPT2LMHeadModel, list[float]]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATION)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=16, n_embd=32, n_head=4, n_layer=2, bos_token_id=0, eos_token_id=0
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=UPDATES)
    data: Any = (torch.randint(32, (2 * 4 * UPDATES, 1)) + torch.arange(16)) % 32
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, scheduler, DataLoader(data, batch_size=4)
    )
    losses, updates = [], 0

    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        updates += accelerator.sync_gradients
        if accelerator.sync_gradients and updates == GROW_AT:  # after a whole update: no gradient is pending
            bare = accelerator.unwrap_model(model)
            plan = aiether.GrowthPlan.interleave(bare, to_layers=4, init="zero")
            print(aiether.grow(bare, plan, optimizer=optimizer, scheduler=scheduler))

    bare = accelerator.unwrap_model(model)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {bare.config.num_hidden_layers} layers")
    return bare, losses


if __name__ == "__main__":
    main()
