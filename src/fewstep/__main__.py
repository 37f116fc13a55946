"""``python -m fewstep`` and ``torchrun -m fewstep``."""

from fewstep.apps.cli import main

main()
