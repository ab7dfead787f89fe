"""The same losses where a tensor-parallel group shares the vocabulary: no rank ever has all logits of a token.

torchrun --nproc-per-node 2 docs/examples/losses_tp.py
"""

import torch
import torch.distributed as dist

from megadistill.losses import Head, LossConfig, distill_loss
from megadistill.parallel import VocabShard

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
T, V, HIDDEN = 16, 101, 32  # an odd vocabulary: shards may differ in size
torch.manual_seed(0)
hidden, weight = torch.randn(T, HIDDEN), torch.randn(V, HIDDEN) * 0.3
seen, teacher_weight = torch.randn(T, 48), torch.randn(V, 48) * 0.3
labels, pairs, config = torch.randint(0, V, (T,)), torch.zeros(T, dtype=torch.bool), LossConfig(divergence="forward_kl")


def loss_of(shard: VocabShard) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient in the hidden states, from the rows of both heads that a shard has."""
    rows = slice(shard.start, shard.stop)
    states = hidden.clone().requires_grad_()
    output = distill_loss(
        Head(states, weight[rows]), Head(seen, teacher_weight[rows]), labels, pairs, None, config, shard,
        num_tokens=T, num_pairs=1,
    )  # fmt: skip
    output.loss.backward()
    assert states.grad is not None
    return float(output.loss.detach()), states.grad


loss, gradient = loss_of(VocabShard.split(V, size, rank, group))
whole, expected = loss_of(VocabShard(0, V, V))
print(f"rank {rank}: {loss:.6f} with a shard, {whole:.6f} with the whole vocabulary")
assert abs(loss - whole) < 1e-5 and torch.allclose(gradient, expected, atol=1e-6)
dist.destroy_process_group()
