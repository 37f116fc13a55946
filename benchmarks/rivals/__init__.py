"""Learned samplers of other papers, each by its own published recipe, on fewstep's kernel.

| file | method | paper | learns | loss | depends on |
|---|---|---|---|---|---|
| `ld3.py` | LD3 | 2405.15506 | times of a solver, and the times that the network is told | ends, relaxed | gradients |
| `s4s.py` | S4S | 2502.17423 | coefficients of a multistep solver | ends, relaxed | gradients |
| `s4s.py` | S4S-Alt | 2502.17423 | coefficients and times in turn | ends, relaxed | gradients |
| `bns.py` | BNS | 2403.01329 | all coefficients and all times | logarithm of ends' errors | gradients |
| `gs.py` | GS, GAS | 2510.17699 | times and corrections of DPM-Solver++ | ends; GAS: and a critic | gradients; GAS: a critic |
| `amed.py` | AMED-Solver, its plugin | 2312.00094 | an evaluation inside each step | each step | gradients, features, per image |
| `epd.py` | EPD-Solver | 2507.14797 | several evaluations side by side in each step | each step | gradients |
| `gits.py` | GITS | 2405.11326 | times of iPNDM | deviations, by dynamic programming | answers alone |
| `oss.py` | OSS | 2503.21774 | times of DDIM | ends, by dynamic programming | answers alone |

A file begins with the formula, the loss, the authors' numbers, and what had to be assumed. `study.py` fits them and measures them as
``fewstep bench`` measures any sampler. Behind them stand `drawn.py` (a solver as numbers that gradients reach), `times.py` and `levels.py`
(times as free numbers, and where papers put them), `teacher.py` (what is learned from, every evaluation counted), `training.py` (the
descent to ends) and `stepwise.py` (the descent of single steps).

To add one: a file with a subclass of `rival.Rival`, and a line in `study.RIVALS`.
"""
