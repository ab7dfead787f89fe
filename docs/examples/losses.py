"""The paper's losses in a training loop of your own: any two models that give hidden states, plain torch."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megadistill.losses import Head, LossConfig, QuantileGate, distill_loss
from megadistill.parallel import VocabShard

V, ROWS, COLUMNS = 320, 4, 12
sizes = {"vocab_size": V, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
torch.manual_seed(0)
teacher = LlamaForCausalLM(LlamaConfig(hidden_size=48, num_hidden_layers=2, **sizes)).requires_grad_(False)
student = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, **sizes))
config = LossConfig()  # every key of the section `loss`: docs/configuration.md
gate = QuantileGate.from_config(config)
optimizer = torch.optim.AdamW([*student.parameters(), *gate.parameters()], lr=3e-3)

tokens = torch.randint(0, V, (ROWS, COLUMNS))  # your rows
labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], dim=1).flatten()  # -100: no loss there
pairs = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
pairs[:, 2:5] = True  # positions 2 to 5 of each row are one phrase: t and t+1 are in one span

for step in range(20):
    with torch.no_grad():
        seen = teacher.model(tokens).last_hidden_state.flatten(0, 1)
    hidden = student.model(tokens).last_hidden_state.flatten(0, 1)
    output = distill_loss(
        Head(hidden, student.lm_head.weight), Head(seen, teacher.lm_head.weight), labels, pairs.flatten(), gate, config,
        VocabShard(0, V, V), num_tokens=int((labels >= 0).sum()), num_pairs=int(pairs.sum()),
    )  # fmt: skip
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    if step in (0, 19):
        print(f"step {step}: loss {output.loss.item():.4f}")
