"""Loading task models and counting what they cost."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from paretoprune.base.errors import typed_line
from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.errors import ModelError, RefusedNameError
from paretoprune.pruning.yolo.pickle_check import REMEDY, check_bounds
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics, trusting


@dataclass(frozen=True)
class ModelStats:
    """Parameters in millions, GFLOPs (2 x multiply-adds) of one square image, float32 weights in MB (1e6 bytes)."""

    params_m: float
    gflops: float
    size_mb: float


def model_file(name: str | Path) -> Path:
    """The checkpoint a person means: a path, or the name of an official model (`yolov8n.pt`), fetched if need be.

    A file of that name is the one that is meant. Its path is absolute: a damaged file that Ultralytics is given by its
    bare official name it deletes, and downloads another.

    Raises:
        ModelError: there is no such file and no such official model, or it cannot be fetched.
    """
    path = Path(name)
    if path.suffix != ".pt":
        raise ModelError(f"a model is an Ultralytics checkpoint (.pt), but got '{name}'; give the path of a .pt file.")
    if path.is_file():
        return path.absolute()
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    if path.parent == Path() and path.name in GITHUB_ASSETS_NAMES:
        with quiet_ultralytics():
            try:
                found = Path(attempt_download_asset(path.name))
            except Exception as error:  # noqa: BLE001  whatever the network and its libraries raise; all mean the same to the user
                raise ModelError(
                    f"'{name}' is not here and could not be fetched ({typed_line(error, 200, whole=True)})."
                ) from None
        if found.is_file():
            return found.absolute()
    raise ModelError(f"the model must be an existing .pt file, but there is no '{name}'; check the path.")


def checked_file(path: str | Path, trust: bool = False) -> Path:
    """The checkpoint as `model_file` finds it; unless it is trusted, its pickle is looked at (RefusedNameError)."""
    found = model_file(path)
    if not trust:
        check_bounds(found)
    return found


def load_model(path: str | Path, trust: bool = False) -> nn.Module:
    """Load a checkpoint as its task model: float32, eval mode, CPU, gradients enabled.

    Without ``trust`` only layers of torch and Ultralytics are made, by Ultralytics' restricted loader within the bounds
    of `check_bounds`, and nothing of the file runs. With it, everything in the file runs, and classes of the user's own
    are imported.

    Raises:
        RefusedNameError: the checkpoint would do something that rebuilding a network does not need.
        ModelError: the file is missing, is no Ultralytics checkpoint, or holds no convolutional block list; or a class
            of the user's own cannot be imported here.
    """
    from ultralytics.nn.tasks import load_checkpoint

    found = checked_file(path, trust)
    with quiet_ultralytics(), trusting(trust):
        try:
            model: nn.Module = load_checkpoint(str(found), device="cpu")[0]
        except Exception as error:  # noqa: BLE001  pickle, zip, attribute and import errors alike: the file is not usable
            raise _unusable(path, error) from None
    if not isinstance(getattr(model, "model", None), nn.Sequential):
        raise ModelError(
            f"'{path}' holds a {type(model).__name__}, which has no numbered blocks; give a YOLO or RT-DETR model."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.float().eval()


def _unusable(path: str | Path, error: Exception) -> ModelError:
    """What to tell of a checkpoint whose loading failed."""
    refused = re.search(r"GLOBAL (\S+) was not an allowed|Unsupported global: GLOBAL (\S+)", str(error.__cause__))
    if refused:
        name = ascii(next(filter(None, refused.groups())))[1:-1][:120]
        return RefusedNameError(
            f"a checkpoint may hold a network and plain data, but '{path}' names {name}; {REMEDY}", name
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return ModelError(
            f"'{path}' needs the module '{error.name}', which cannot be imported here; put its folder on PYTHONPATH, "
            "on every machine that works on it"
        )
    return ModelError(
        f"'{path}' must be an Ultralytics checkpoint, but it cannot be loaded: {typed_line(error, 200, whole=True)}"
    )


def model_stats(model: nn.Module, imgsz: ImageSize) -> ModelStats:
    """Cost of a model on an image of this size, counted as stock `model.info()` does. The model is not touched."""
    from ultralytics.utils.torch_utils import get_flops

    parameters = sum(p.numel() for p in model.parameters())
    state = sum(t.numel() for t in model.state_dict().values())
    flops: Any = get_flops(copy.deepcopy(model), imgsz)
    return ModelStats(params_m=parameters / 1e6, gflops=float(flops), size_mb=state * 4 / 1e6)


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a task model takes."""
    yaml = getattr(model, "yaml", None)
    stated = (yaml.get("channels") or yaml.get("ch")) if isinstance(yaml, dict) else None
    return int(stated or next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3))
