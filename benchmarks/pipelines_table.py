"""What each pipeline that the tests lead by its own calls gains, as rows of a table.

python benchmarks/pipelines_table.py                  all pipelines that have no row yet
python benchmarks/pipelines_table.py wan-2.2 chroma   these, anew

The pipelines are those of the tests: small, with random weights, saved and loaded as a user does. A row is written as soon as it is
measured, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from fewstep.runtime.artifact import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pipelines.json"
MAKES = {
    "kontext": "picture from text and picture",
    "flux-fill": "picture from text, inpainting",
    "flux-controlnet": "picture from text, ControlNet",
    "flux-2": "picture from text and pictures",
    "qwen-image": "picture from text",
    "z-image": "picture from text",
    "chroma": "picture from text",
    "sana": "picture from text",
    "pixart-sigma": "picture from text",
    "lumina-2": "picture from text",
    "auraflow": "picture from text",
    "instruct-pix2pix": "picture from text and picture",
    "wan": "video from text (Wan 2.1)",
    "wan-2.2": "video from text, two experts (Wan 2.2)",
    "wan-2.2-ti2v": "video from text (Wan 2.2, TI2V)",
    "wan-i2v": "video from picture (Wan 2.1)",
    "wan-2.2-i2v": "video from picture, two experts (Wan 2.2)",
    "wan-2.2-ti2v-picture": "video from picture (Wan 2.2, TI2V)",
    "cogvideox": "video from text",
    "ltx": "video from text",
    "hunyuan-video": "video from text",
    "mochi": "video from text",
    "sana-video": "video from text",
    "animatediff": "video from text",
    "stable-audio": "sound from text",
    "ace-step": "music from text and lyrics",
    "sd-ip-adapter": "picture from text, IP-adapter",
    "sd-lora": "picture from text, LoRA",
    "marigold": "depth from picture",
    "sdxl-modular": "picture from text, guider (modular)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="pipelines to measure anew")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in MAKES]:
        parser.error(f"unknown pipeline {unknown[0]!r}: there are {', '.join(MAKES)}")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of theirs, at every call
    rows = {row["pipeline"]: row for row in json.loads(args.out.read_text())["rows"]} if args.out.is_file() else {}
    for name in args.names or [name for name in MAKES if name not in rows]:
        rows[name] = measured(name)
        ordered = [rows[one] for one in MAKES if one in rows]
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        write_whole(args.out, json.dumps({**about, "rows": ordered}, indent=1).encode() + b"\n")
        print(name, f"{rows[name]['own'] / rows[name]['fitted']:.2f}", flush=True)


def measured(name: str) -> dict[str, Any]:
    """Return the row of one pipeline."""
    from tests.integrations.diffusers.conftest import MAKERS
    from tests.integrations.diffusers.led import CALLS, GUIDERS, NOISY, REFUSED, STEPS, fit_errors, steps_apart
    from tests.integrations.diffusers.tiny_pipelines import load, make

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = make(name, Path(folder), MAKERS)
        found, errors = steps_apart(load(place), CALLS[name]), fit_errors(load(place), CALLS[name], Path(folder) / "fitted")
        pipe = load(place)
    refused = [kind for kind, (of, _, _) in REFUSED.items() if of == name] + (list(GUIDERS) if hasattr(pipe, "guider") else [])
    return {
        "pipeline": name,
        "class": type(pipe).__name__,
        "makes": MAKES[name],
        "scheduler": type(pipe.scheduler).__name__,
        "ddim": None if type(pipe.scheduler).__name__ in NOISY else found["own"],
        "in_pipeline": found["stepped"],
        "steps": STEPS,
        "own": errors["own"],
        "fitted": errors["fitted"],
        "saved": errors["saved"],
        "refused": refused,
        "seconds": round(time.perf_counter() - began),
    }


if __name__ == "__main__":
    main()
