"""What a base model says of itself: whether it predicts noise or velocity, and on which schedule.

Read from headers and configurations; imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sdxl_train.ldm.headers import read_header
from sdxl_train.ldm.sources import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdxl_train.ldm.sources import Source
    from sdxl_train.schedule import PredictionType

_BY_METADATA: Final[Mapping[str, PredictionType]] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
}
_BY_CONFIG: Final[Mapping[str, PredictionType]] = {
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model says of itself; what it does not say is None or False.

    Attributes:
        prediction_type: What its U-Net predicts.
        prediction_place: Where that stands.
        zero_terminal_snr: Whether its last timestep is pure noise.
        schedule_place: Where that stands.
    """

    prediction_type: PredictionType | None = None
    prediction_place: str = ""
    zero_terminal_snr: bool = False
    schedule_place: str = ""


def said_by(source: Source, *, pickles: bool) -> Said:
    """Read what a model says of itself: nothing, where it is not on this machine yet.

    Args:
        source: The model.
        pickles: Whether it may be a file that torch wrote.

    Raises:
        BadFileError: If its header or configuration cannot be read.
    """
    if source.path is None or source.kind == "missing":
        return Said()
    if source.kind != "file":
        config = read_json(source.path / "scheduler" / "scheduler_config.json")
        said = _BY_CONFIG.get(config.get("prediction_type", ""))
        return Said(
            prediction_type=said,
            prediction_place="its scheduler_config.json" if said else "",
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
            schedule_place="its scheduler_config.json",
        )
    header = read_header(source.path, pickles=pickles)
    said, where = _BY_METADATA.get(header.metadata.get("modelspec.prediction_type", "")), ""
    if "v_pred" in header.shapes:
        said, where = "v_prediction", "its marker v_pred"
    elif said:
        where = "its metadata"
    return Said(
        prediction_type=said,
        prediction_place=where,
        zero_terminal_snr="ztsnr" in header.shapes,
        schedule_place="its marker ztsnr",
    )
