"""Settings of every test: problems are tiny, so threads only cost; hypothesis tries the same examples every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fewstep", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("fewstep")
