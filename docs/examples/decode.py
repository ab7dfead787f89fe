"""Text from a model that may be shared by several processes; the same text on every layout.

python docs/examples/decode.py MODEL
torchrun --nproc-per-node 2 docs/examples/decode.py MODEL
"""

import sys

import megadistill

with megadistill.open_model(sys.argv[1]) as model:
    prompts = ["Name a river.", "Write a sentence about a cat."]
    answers = model.answer(prompts, max_new_tokens=16, temperature=0.8, seed=1)
    if model.context.is_rank0:
        print("\n".join(answers))
