"""What a worker does, read from its events."""

from __future__ import annotations

from pathlib import Path

from paretoprune.search.storage.event_log import PhaseClock, activity


def test_what_a_worker_does_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert activity(path).text == ""
    clock = PhaseClock(path)
    said = []
    with clock.phase("evaluate"):
        said.append(activity(path).text)
    clock.event("rung", epochs=0)
    with clock.phase("finetune", epochs=3):
        said.append(activity(path).text)
        for epoch in (1, 2, 3):
            clock.event("epoch", epoch=epoch, map50_95=0.5)
            said.append(activity(path).text)
    clock.step("scoring channels, step 2 of 5")
    said.append(activity(path).text)
    clock.event("epoch", stage="session-2", epoch=1, epochs=4)
    said.append(activity(path).text)
    with clock.phase("phase of a later version"):
        said.append(activity(path).text)
    assert said == [
        "validation without epochs",
        "fine-tuning, epoch 1 of 3",
        "fine-tuning, epoch 2 of 3",
        "fine-tuning, epoch 3 of 3",
        "fine-tuning, epoch 3 of 3",
        "scoring channels, step 2 of 5",
        "fine-tuning, session-2, epoch 2 of 4",
        "phase of a later version",
    ]
    clock.event("finished", state="completed")
    assert activity(path).text == "finished"
    with path.open("a") as stream:
        stream.write('{"event": "st')  # being written right now
    assert activity(path).text == "finished"
