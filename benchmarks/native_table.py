"""The page of the comparison with the next smaller native model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

PARENT, PRUNED, NATIVE, TWICE, SESSION = "yolov8s", "pruned yolov8s", "yolov8n", "yolov8n, twice", "session"
ORDER = (PARENT, PRUNED, NATIVE, TWICE)
_SHOWN = ("cpu_model", "cpu_usable", "gpu", "python", "torch", "ultralytics")
_AT = ("epochs", "imgsz", "device")
WHAT = {
    PARENT: "Ultralytics' training",
    PRUNED: "the same network, cut to yolov8n's latency, refitted, our full fine-tuning",
    NATIVE: "Ultralytics' training in one go",
    TWICE: "Ultralytics' training, then our full fine-tuning",
}


def markdown(content: Mapping[str, Any]) -> str:
    """The figures as a page; what is not measured is left empty."""
    environment = content["environment"]
    facts = ", ".join(f"{key} {environment[key]}" for key in _SHOWN if environment.get(key) not in (None, ""))
    parts = [
        "# A pruned yolov8s against yolov8n",
        f"{facts}. Written by `python -m benchmarks.native`; every cell is in native.json. What somebody would take "
        "instead of pruning is the next smaller model of the family: yolov8s is brought to the dataset, cut to the "
        "latency measured for yolov8n (one plan by sensitivity, no search), and fine-tuned fully; yolov8n gets the "
        "same total of epochs, once in one training and once divided as the pruned one's. Latency is that of batch 1, "
        "all networks of a seed timed in turn in one session; intervals are 95 %: of the speed-up for another "
        "measurement at another time (docs/latency.md), "
        "of the difference in mAP50-95 by a paired bootstrap over the validation images.",
    ]
    for at in dict.fromkeys(tuple(cell[key] for key in _AT) for cell in content["cells"]):
        cells = [cell for cell in content["cells"] if tuple(cell[key] for key in _AT) == at]
        parts += _one_setting(dict(zip(_AT, at, strict=True)), cells)
    return "\n\n".join([*parts, *(str(note) for note in content["notes"])]) + "\n"


def _one_setting(at: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first, _, second = str(at["epochs"]).partition("+")
    dates = " and ".join(sorted({f"{cell['date']} (commit {cell['commit']})" for cell in cells}))
    yield f"## {first} + {second} epochs, {at['imgsz']} px, {at['device']}"
    yield f"Measured on {dates}."
    seeds = sorted({cell["seed"] for cell in cells})
    for seed in seeds:
        own = {cell["network"]: cell for cell in cells if cell["seed"] == seed}
        if any(network in own for network in ORDER):
            yield "\n".join([f"Seed {seed}:", "", *_table(own, int(first), int(second))])
    yield _over_seeds([cell for cell in cells if cell["network"] == SESSION])


def _table(own: Mapping[str, Mapping[str, Any]], first: int, second: int) -> Iterator[str]:
    yield (
        "| network | trained by | epochs | mAP50-95 | mAP50 | parameters, M | GFLOPs | latency, ms | speed-up over "
        f"{NATIVE} | mAP50-95 less {NATIVE}'s | less that of '{TWICE}' |"
    )
    yield "|---" * 11 + "|"
    judged = own[SESSION]["networks"] if SESSION in own else {}
    for network in ORDER:
        if network not in own:
            continue
        cell, row = own[network], judged.get(network, {})
        low, high = row.get("speedup_ci95", (None, None))
        speedup = f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})" if low is not None and network != NATIVE else ""
        yield (
            "| "
            + " | ".join(
                [
                    network,
                    WHAT[network],
                    str(first if network == PARENT else first + second),
                    f"{cell['map50_95']:.3f}",
                    f"{cell['map50']:.3f}",
                    f"{cell['params_m']:.2f}",
                    f"{cell['gflops']:.2f}",
                    f"{row['median_ms']:.1f}" if row else "",
                    speedup,
                    _difference(row.get("over_native")),
                    _difference(row.get("over_twice")),
                ]
            )
            + " |"
        )


def _difference(found: Sequence[float] | None) -> str:
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*found) if found else ""


def _over_seeds(sessions: Sequence[Mapping[str, Any]]) -> str:
    """The mean over seeds with Student's interval; one seed says nothing about the training's luck."""
    if not sessions:
        return "Not timed and not compared yet."
    lines = []
    for other, key in ((NATIVE, "over_native"), (TWICE, "over_twice")):
        found = [cell["networks"][PRUNED][key][0] for cell in sessions]
        if len(found) == 1:
            low, high = sessions[0]["networks"][PRUNED][key][1:]
            side = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            lines.append(f"- Against '{other}': {found[0]:+.3f}, {side} by these images; one seed, so how much of it "
                         "is the training's luck is not measured.")  # fmt: skip
        else:
            from scipy.stats import t

            half = float(t.ppf(0.975, len(found) - 1)) * stdev(found) / len(found) ** 0.5
            lines.append(f"- Against '{other}': {mean(found):+.3f} on average over {len(found)} seeds (95 % interval "
                         f"{mean(found) - half:+.3f} to {mean(found) + half:+.3f}).")  # fmt: skip
    return "\n".join([f"The pruned {PARENT}'s mAP50-95 less the native model's:", "", *lines])
