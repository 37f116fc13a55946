"""Distil guidance: a student that is told the scale and answers with one call where its teacher makes two.

A student that is worth having takes far longer to train; this one learns for seconds, to show how it goes.
"""

import fewstep

teacher = fewstep.load_model("digits-edm")
config = fewstep.GuidedConfig(steps=60, batch=32, ema=0.9, held_out=32, slots=8)
student = fewstep.distill(teacher, "guided", config=config)
assert student is not None  # it is None in all processes of torchrun but the first

for scale, (error, worst) in student.card["calls"].items():
    print(f"scale {scale}: one call is {error:.3f} from the teacher's two, {worst:.3f} at the worst noise level")
for scale in (1.0, 2.0, 4.0):
    ours = fewstep.sample(student, "unipc-2", nfe=8, guidance=scale, seeds=range(32))
    theirs = fewstep.sample(teacher, "unipc-2", nfe=8, guidance=scale, seeds=range(32))
    print(f"guidance {scale:g}, 8 calls instead of 16: error {(ours - theirs).square().mean().sqrt():.3f}")

halved = fewstep.distill(student, "progressive", config=fewstep.ProgressiveConfig(nfe=(4, 2), steps=20, batch=32, ema=0.9, held_out=32))
images = fewstep.sample(halved, guidance=3, seeds=range(4))
print(f"{len(images)} images at guidance 3 in 2 calls each")
