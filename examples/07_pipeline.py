"""Put a sampler into a diffusers pipeline: any solver by name, or one fitted to the pipeline.

The pipeline is put together here from the bundled network of digits; a text-to-image pipeline also takes prompts and a guidance scale.
"""

import diffusers
import torch

import fewstep
from fewstep.integrations.diffusers import FewstepScheduler

network = fewstep.load_model("digits-ddpm").network  # a UNet2DModel that predicts noise
pipe = diffusers.DDPMPipeline(unet=network, scheduler=diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False))
pipe.set_progress_bar_config(disable=True)
config = pipe.scheduler.config

model = fewstep.from_pipeline(pipe)  # with prompts: from_pipeline(pipe, ["a red cat", ...], guidance_scale=5)
fewstep.fit(model, nfe=5, config=fewstep.FitConfig(budget=3000), out="fitted-pipeline")


def images(scheduler, steps, num=64):
    """The pipeline's loop, from the noises of the seeds 0, 1, ..."""
    scheduler.set_timesteps(steps)
    x = fewstep.seeded_noise(range(num), model.shape) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


exact = images(diffusers.UniPCMultistepScheduler.from_config(config), 100)
for name, scheduler in {
    "DDIMScheduler": diffusers.DDIMScheduler.from_config(config),
    "DPMSolverMultistepScheduler": diffusers.DPMSolverMultistepScheduler.from_config(config),
    "UniPCMultistepScheduler": diffusers.UniPCMultistepScheduler.from_config(config),
    "unipc-2, trailing": FewstepScheduler.from_config(config, solver="unipc-2", timestep_spacing="trailing"),
    "fitted": FewstepScheduler.from_sampler("fitted-pipeline", config),
}.items():
    error = (images(scheduler, 5) - exact).square().mean().sqrt()
    print(f"5 steps by {name}: error {error:.4f}")

pipe.scheduler = FewstepScheduler.from_sampler("fitted-pipeline", config)
pipe(batch_size=4, num_inference_steps=5).images[0].resize((128, 128)).save("digit.png")
