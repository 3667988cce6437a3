"""Growth in a plain PyTorch loop: a small Llama goes from 2 to 4 layers half-way."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

import aiether

STEPS, GROW_AT = 60, 30


def tokens(step: int) -> torch.Tensor:
    """Counting modulo 32 from random starts."""
    start = torch.randint(32, (8, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(16)) % 32


def main() -> tuple[LlamaForCausalLM, list[float]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=STEPS)
    losses = []

    for step in range(STEPS):
        batch = tokens(step)
        if step == GROW_AT:
            plan = aiether.GrowthPlan.stack(model, to_layers=4, init="copy")
            print(
                aiether.grow(
                    model,
                    plan,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    batch={"input_ids": batch, "labels": batch},
                )
            )
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {model.config.num_hidden_layers} layers")
    return model, losses


if __name__ == "__main__":
    main()
