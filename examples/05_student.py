"""Distil a model into a student that samples in one pass, from trajectories that the model makes itself.

A student that is worth having takes half an hour of training; this one learns for seconds, to show how it goes.
"""

import fewstep

teacher = fewstep.load_model("digits-edm")
config = fewstep.DistillConfig(num=128, held_out=64, steps=50, batch=32, ema=0.9)  # by default 6000 steps, 16384 trajectories
student = fewstep.distill(teacher, "kd", config=config, out="student")
assert student is not None  # it is None in all processes of torchrun but the first

for step, loss in student.card["curve"][:: len(student.card["curve"]) - 1]:
    print(f"step {step}: loss {loss:.4f}")
images = fewstep.sample(student, nfe=1, seeds=range(4))
print(f"{len(images)} images of {tuple(images.shape[1:])} in one pass each")

bundled = fewstep.load_model("digits-flow-map")  # distilled from the same teacher for an hour
exact = fewstep.sample(teacher, "unipc-3", nfe=64, grid="karras", seeds=range(64))
for name, made in {
    "the teacher by ddim": fewstep.sample(teacher, "ddim", nfe=1, seeds=range(64)),
    "this student": fewstep.sample(student, nfe=1, seeds=range(64)),
    "digits-flow-map": fewstep.sample(bundled, nfe=1, seeds=range(64)),
}.items():
    print(f"one evaluation, error to the teacher's trajectories: {name} {(made - exact).square().mean().sqrt():.4f}")
