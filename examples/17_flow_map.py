"""Distil a flow map, one student for any number of passes, and use it in one pass, in four, on another grid, and from a noised image.

A student that is worth having takes far longer to train; this one learns for seconds, to show how it goes.
"""

import fewstep

teacher = fewstep.load_model("digits-edm")
config = fewstep.FlowMapConfig(own=0.5, num=256, held_out=64, steps=60, batch=32, ema=0.9, max_passes=4)
student = fewstep.distill(teacher, "flow-map", config=config)
assert student is not None  # it is None in all processes of torchrun but the first

exact = fewstep.sample(teacher, "unipc-3", nfe=64, grid="karras", seeds=range(64))
for nfe in (1, 2, 4):
    made, plain = fewstep.sample(student, nfe=nfe, seeds=range(64)), fewstep.sample(teacher, "ddim", nfe=nfe, seeds=range(64))
    errors = [float((one - exact).square().mean().sqrt()) for one in (made, plain)]
    print(f"{nfe} passes, error to the teacher's trajectories: {errors[0]:.4f}, the teacher by as many steps of ddim: {errors[1]:.4f}")

other = fewstep.sample(student, "ddim", nfe=7, grid="karras", seeds=range(4))
near = fewstep.sample(student, nfe=2, seeds=range(4), x0=exact[:4], strength=0.3)
print(f"on another grid: {tuple(other.shape)}; image to image moves by {(near - exact[:4]).square().mean().sqrt():.3f}")
