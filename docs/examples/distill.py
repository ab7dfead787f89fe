"""A whole run from a notebook; here on the built-in corpus, two minutes on two cores.

Your own: megadistill.distill("mine.yaml", "run.dir=runs/mine").
"""

import megadistill

summary = megadistill.distill("configs/smoke.yaml", "run.dir=runs/notebook", "train.max_steps=4")
print(f"{summary['steps']} steps in {summary['seconds']:.0f} s; loss {summary['last_step']['loss']:.3f}")

with megadistill.open_model("runs/notebook") as student:
    print(student.answer(["Put the sentence into the passive voice.\nThe cat sees the dog."], temperature=0)[0])
