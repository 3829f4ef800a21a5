"""Accuracy without a gradient step by input size and widths: how a cut is best shared between them.

Usage: python -m benchmarks.size_and_width RUN 320:1 320:0.5 256:0.8 224:0.7 ...

RUN is a folder of `paretoprune search`, whose model, dataset, scores and sensitivity path are used. Each point is a
side of the input, pixels, and the share of the multiply-adds that the widths leave there: the nearest plan of the path
is cut, refitted at that size and validated on the whole split; 1 is the unpruned network. Prints a row as soon as it
is known: the share of the work at the run's size that is left in all, and the accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from paretoprune.pruning.device import NullGate
from paretoprune.pruning.plan import Plan
from paretoprune.results.store.accuracy import accuracy_name
from paretoprune.search.config.run_config import load_config
from paretoprune.search.trial.operations import PruningOperations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("points", nargs="+", metavar="SIZE:KEEP")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml")
    tools = PruningOperations(config, options.device, NullGate())
    tools.recall_scores(options.run)
    path = json.loads((options.run / "baseline.json").read_text(encoding="utf-8"))["sensitivity"]
    whole = tools.stats(tools.baseline)["gflops"]
    print("| input, px | work of the widths | work in all | accuracy | seconds |\n|---|---|---|---|---|")
    for size, keep in ((int(size), float(keep)) for size, keep in (point.split(":") for point in options.points)):
        began, imgsz = time.monotonic(), None if size == config.model.imgsz else size
        its, model = tools.at(imgsz), tools.baseline
        if keep < 1:
            row = min(path, key=lambda row: abs(row["keep"] - keep))
            model, plan = its.prune(Plan(row["ratios"], imgsz=imgsz))
            its.recover(model, plan)
        metrics, work = its.evaluate(model), its.stats(model)["gflops"] / whole
        seconds = time.monotonic() - began
        print(f"| {size} | {keep:g} | {work:.3f} | {metrics[accuracy_name(metrics)]:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
