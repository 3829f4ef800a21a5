"""Our surgery against torch-pruning's: the same channels removed through its graph, and the benchmark of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.graph_surgery import FAMILIES, remove_by_graph
from benchmarks.surgery import main, random_widths
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune
from tests.pruning.masking import build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_prunings_graph_gives_the_same_network_bit_for_bit(name: str) -> None:
    model = build(name)
    table, rng = build_layer_table(model), np.random.default_rng(0)
    image = torch.rand(1, 3, 64, 64)
    for _ in range(2):
        ours, plan = prune(model, table, random_widths(table, rng), rng.random(table.class_count))
        theirs = remove_by_graph(model, table, plan.kept)
        mine, other = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
        assert torch.equal(ours(image)[0], theirs(image)[0])


def test_the_benchmark_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--plans", "2", "--applications", "10", "--families", "yolov8n", "--output", str(tmp_path)])
    torch.set_num_threads(threads)
    text = (tmp_path / "surgery.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    result = json.loads((tmp_path / "surgery.json").read_text())
    assert {"date", "commit", "environment", "against_graph", "families", "memory"} <= result.keys()
    assert [row["traced_at"] for row in result["against_graph"]] == [64, 640]
    for row in result["against_graph"]:
        assert f"| yolov8n | {row['traced_at']} px | {row['ours_ms']['median']:.1f} (" in text
    assert list(result["memory"]["rss_mb"]) == [str(i) for i in range(1, 11)]
    assert str(tmp_path) not in text + json.dumps(result)
