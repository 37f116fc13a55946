"""Measure a model's statistics and drive DPM-Solver-v3 with them: the best hand-made solver for 5 to 10 evaluations on many models.

A calibration needs no data: it visits the model's own sampling trajectories. The one here is a quick one.
"""

import fewstep

model = fewstep.load_model("digits-edm")
config = fewstep.CalibrationConfig(levels=20, num=32)  # by default 30 cells of noise levels and 128 trajectories
statistics = fewstep.calibrate(model, config=config, out="statistics")
print(statistics)

solver = fewstep.DPMSolverV3(statistics)
images = fewstep.sample(model, solver, nfe=6, seeds=range(4))
print(f"{len(images)} images of {tuple(images.shape[1:])}")
print(fewstep.compare(model, ["dpm-solver-pp-2m", "unipc-2", solver], nfe=[5, 6, 8], num=64))
