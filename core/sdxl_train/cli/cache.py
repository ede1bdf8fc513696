"""``sdxl-train cache``: make the caches of a run ahead of it, or tidy them up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.cli.console import warn
from sdxl_train.cli.invocation import CoreCommand
from sdxl_train.errors import UserError
from sdxl_train.options import Setting
from sdxl_train.wording import in_one_line

if TYPE_CHECKING:
    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.preflight import Prepared

_SUMMARY = "Encode the images and captions of a run ahead of it, into its caches on disk."
_USAGE = f"""\
usage: sdxl-train cache FLAGS [--import_npz | --prune]

{_SUMMARY}

  FLAGS         those of training, of which --cache_latents_to_disk and
                --cache_text_encoder_outputs_to_disk say what to encode; no --output_dir is needed
  --import_npz  of images that sd-scripts has encoded, keep its latents where they agree with what
                the VAE makes of the image now; the others are made anew
  --prune       encode nothing: remove the files of these caches that no image or caption of the
                datasets uses, as the flags have it

Interrupted (Ctrl-C), it keeps what it has encoded and goes on there the next time."""


def run(invocation: Invocation) -> int:
    """Fill the caches, or prune them."""
    from sdxl_train.data.scan_index import user_cache
    from sdxl_train.preflight import prepare

    prunes, imports = invocation.take_switch("prune"), invocation.take_switch("import_npz")
    if prunes and imports:
        raise UserError.of("--import_npz", "encodes, and --prune does not", "leave one of them out")
    invocation.refuse_leading()
    # Nothing is written there; it only has to be a place without the files of an earlier run.
    nowhere = Setting(value=str(user_cache()), place="--output_dir", origin="default")
    settings = {"output_dir": nowhere, **invocation.settings}
    prepared = prepare(settings, invocation.host)
    _require_disk(prepared, imports=imports)
    warn([*invocation.notices, *prepared.scan.warnings])

    # Only now, when the input is known to be right, is torch worth its import.
    from sdxl_train.caching import fill_caches, prune_caches

    if prunes:
        for folder in prune_caches(prepared):
            print(in_one_line(str(folder)))
        return 0
    try:
        fill_caches(prepared, imports_latents=imports)
    except KeyboardInterrupt:
        warn(["interrupted; what is encoded is kept, and the next time goes on there"])
        return 130
    return 0


def _require_disk(prepared: Prepared, *, imports: bool) -> None:
    data, config = prepared.config.dataset, prepared.config
    if imports and not data.cache_latents_to_disk:
        raise UserError.of(
            "--import_npz", "has no effect without --cache_latents_to_disk", "add it"
        )
    if not (data.cache_latents_to_disk or data.cache_text_encoder_outputs_to_disk):
        given = [
            name for name in ("cache_latents", "cache_text_encoder_outputs") if getattr(data, name)
        ]
        raise UserError.of(
            ", ".join(config.place(name) for name in given) or "sdxl-train cache",
            "keeps nothing on the disk",
            "add --cache_latents_to_disk, --cache_text_encoder_outputs_to_disk or both, here and "
            "in training",
        )


COMMAND = CoreCommand(run=run, summary=_SUMMARY, usage=_USAGE)
