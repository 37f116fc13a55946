"""``fewstep models``."""

from __future__ import annotations

from fewstep.apps.console import console, next_command, print_json
from fewstep.apps.options import AsJson
from fewstep.core.spacings import KNOWN
from fewstep.models.zoo import BUNDLED
from fewstep.solvers import solvers_by_family

__all__ = ["models"]


def models(json: AsJson = False) -> None:
    """List the bundled models, the solvers and the grids."""
    families = solvers_by_family()
    solvers = {name: about for family in families.values() for name, about in family.items()}
    known = {"models": {name: about for name, (about, _) in BUNDLED.items()}, "solvers": solvers, "grids": list(KNOWN)}
    if json:
        print_json(known)
        return
    for name, about in known["models"].items():
        console.print(f"{name:16} {about}")
    for family, names in families.items():
        console.print(f"\n{family}", style="bold")
        for name, about in names.items():
            console.print(f"  {name:26} {about}")
    console.print(f"\ngrids            {', '.join(known['grids'])}\n")
    console.print(next_command("sample", "digits-edm", "--nfe", 6, "--out", "runs/sample"))
