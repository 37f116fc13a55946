r"""Numbers only: noise laws, time grids, tableaux and the one loop that runs them.

Conventions, fixed once for the whole library
---------------------------------------------
* Forward process ``x_t = alpha_t x0 + sigma_t eps``; ``lam = log(alpha / sigma)`` is half the log-SNR
  (DPM-Solver's notation) and ``sigma / alpha`` the noise level. Sampling runs with ``t`` decreasing and ``lam`` increasing.
* Shapes: ``B`` batch, ``*D`` data, ``N`` network evaluations, ``K`` history, ``*E`` a coefficient shape that
  broadcasts to ``*D`` (scalar, channel or element). A state is ``[B, *D]``; a time ``[]`` in sampling, ``[B]`` in training.
* A denoiser returns ``x0``. Other predictions exist at the network's boundary only (`fewstep.core.prediction`).
* Times, ``lam`` and coefficients are float64 on the CPU; the state is at least float32; the network keeps its dtype.
* Both ends are legal: ``alpha = 0`` (rectified flow, zero terminal SNR) and ``sigma = 0`` (the clean image).
"""
