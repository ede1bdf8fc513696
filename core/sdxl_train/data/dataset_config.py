"""What the user asked to train on, resolved: datasets and subsets with every value and its origin.

The datasets come from a dataset file, or from the ``N_name`` folders of ``train_data_dir`` and
``reg_data_dir``. Each value is that of the subset, the dataset, ``[general]``, the command line or
the default, whichever is set first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.data.buckets import BucketOptions, Size
from sdxl_train.data.captions import CaptionOptions
from sdxl_train.data.dataset_file import SubsetTable, read_dataset_file
from sdxl_train.data.dataset_options import DEFAULT, DatasetOptions
from sdxl_train.data.dataset_rules import (
    face_crop_problems,
    idle_remarks,
    mask_problems,
    metadata_problems,
    overridden_remarks,
    shadowed_remarks,
    spelling_problems,
    style_problems,
    subset_problems,
)
from sdxl_train.data.folders import (
    DATASET_FILE,
    METADATA_FILE,
    file_problem,
    find_folders,
    folder_problem,
)
from sdxl_train.data.layers import Layer, Values
from sdxl_train.data.views import ViewOptions
from sdxl_train.errors import Problem, UserError
from sdxl_train.files import expanded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sdxl_train.data.dataset_file import KeyPlaces
    from sdxl_train.toml_files import KeyPath

__all__ = ["DEFAULT", "DatasetConfig", "DatasetOptions", "SubsetConfig", "resolve_datasets"]


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """One folder, or metadata file, of images and what is done to them.

    Attributes:
        place: Where the subset is defined, for messages.
        image_dir: The folder; only files directly in it count. With a metadata file, the folder
            that its names begin in.
        metadata_file: The file that names the images and their captions.
        num_repeats: Times that each image is trained in an epoch.
        is_reg: Whether these are regularization images.
        class_tokens: Caption of the images that have none.
        caption_extensions: Endings of caption files; the first one that exists is read.
        captions: What is done to captions.
        views: What differs about the images from time to time.
        resize_interpolation: How images are resized; None: by area or lanczos, as it fits.
        alpha_mask: Whether the images' own alpha channels are their masks.
        mask_dir: Folder of the images' masks.
        preserves_output: Whether the target is what the model predicts without the network.
        values: Each value as it was given, by option name.
        origins: Where each value comes from, by option name.
    """

    place: str
    image_dir: Path | None
    metadata_file: Path | None
    num_repeats: int
    is_reg: bool
    class_tokens: str | None
    caption_extensions: tuple[str, ...]
    captions: CaptionOptions
    views: ViewOptions
    resize_interpolation: str | None
    alpha_mask: bool
    mask_dir: Path | None
    preserves_output: bool
    values: Mapping[str, Any]
    origins: Mapping[str, str]

    @property
    def source(self) -> Path:
        """What names the images: the metadata file, else the folder."""
        source = self.metadata_file or self.image_dir
        assert source is not None
        return source


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Subsets that are trained at one resolution and batch size.

    Attributes:
        place: Where the dataset is defined, for messages.
        subsets: Its folders, in the order given.
        batch_size: Images in a batch.
        resolution: Training size.
        buckets: How training sizes are found.
        validation_split: Share of each subset's images that is held out of training.
        validation_seed: Decides which ones.
        values: Each value as it was given, by option name.
        origins: Where each value comes from, by option name.
    """

    place: str
    subsets: tuple[SubsetConfig, ...]
    batch_size: int
    resolution: Size
    buckets: BucketOptions
    validation_split: float
    validation_seed: int
    values: Mapping[str, Any]
    origins: Mapping[str, str]


def resolve_datasets(
    options: DatasetOptions, place: Callable[[str], str], *, resolution: int | None = None
) -> tuple[list[DatasetConfig], list[Problem], list[str]]:
    """Find out what to train on.

    Args:
        options: The options of the run. Those that the user gave must be set, the others not: the
            set ones (``model_fields_set``) have an origin, and some warnings depend on it.
        place: Gives the place of an option by its name, such as ``--resolution``.
        resolution: Side of the training size where none is given; None: it must be.

    Returns:
        The datasets, everything that is wrong, and warnings. No image is looked at yet.
    """
    sources = ("train_data_dir", "reg_data_dir", "in_json")
    folders = [name for name in sources if getattr(options, name) is not None]
    if options.dataset_config is not None and folders:
        both = Problem(
            place=place("dataset_config"),
            message=f"given together with {' and '.join(place(name) for name in folders)}",
            remedy="name the images in one way only",
        )
        return [], [both], []
    if options.dataset_config is not None or folders:
        datasets, problems, warnings = (
            _from_file(options.dataset_config, options, place, resolution)
            if options.dataset_config is not None
            else _from_metadata(options.in_json, options, place, resolution)
            if options.in_json is not None
            else _from_folders(options, place, resolution)
        )
        problems += [
            *spelling_problems(options, place),
            *mask_problems(datasets, options, place),
        ]
        return datasets, problems, [*warnings, *idle_remarks(datasets)]
    nothing = Problem(
        place=place("train_data_dir"),
        message="no images to train on are named",
        remedy="give --train_data_dir (a folder of N_name folders), --dataset_config, or "
        "--in_json (a metadata file)",
    )
    return [], [nothing], []


def _from_file(
    path: Path, options: DatasetOptions, place: Callable[[str], str], resolution: int | None
) -> tuple[list[DatasetConfig], list[Problem], list[str]]:
    path = expanded(path)
    problem = file_problem(path, place("dataset_config"), DATASET_FILE)
    if problem:
        return [], [problem], []
    try:
        file, places, faults = read_dataset_file(path)
    except UserError as error:
        return [], list(error.problems), []
    resolver = _Resolver(options, place, path.parent, resolution)
    general = Layer(file.general, lambda name: places.of(("general", name)))
    for number, table in enumerate(file.datasets):
        origins = partial(_key_place, places, ("datasets", number))
        subsets = [
            Layer(subset, partial(_key_place, places, ("datasets", number, "subsets", index)))
            for index, subset in enumerate(table.subsets)
        ]
        resolver.add(subsets, [Layer(table, origins), general], places.of(("datasets", number)))
    resolver.problems[:0] = faults
    remarks = list(overridden_remarks(resolver.datasets, options, place))
    if not resolver.problems:
        remarks += shadowed_remarks(resolver.datasets, file, places.of)
    return resolver.datasets, resolver.problems, remarks


def _from_folders(
    options: DatasetOptions, place: Callable[[str], str], resolution: int | None
) -> tuple[list[DatasetConfig], list[Problem], list[str]]:
    found = find_folders(options.train_data_dir, is_reg=False, place=place("train_data_dir"))
    regularization = find_folders(options.reg_data_dir, is_reg=True, place=place("reg_data_dir"))
    problems = [*found.problems, *regularization.problems]
    warnings = [*found.warnings, *regularization.warnings]
    if options.train_data_dir is None:
        problems.append(
            Problem(
                place=place("reg_data_dir"),
                message="regularization images only, and nothing to train",
                remedy="give --train_data_dir too",
            )
        )
    tables = [*found.subsets, *regularization.subsets]
    if "dataset_repeats" in options.model_fields_set and all(t.num_repeats for t in tables):
        warnings.append(f"{place('dataset_repeats')}: no effect, every folder's name says its own")
    resolver = _Resolver(options, place, Path(), resolution)
    layers = [Layer(table, partial(_folder_place, table, place)) for table in tables]
    if not problems:
        resolver.add(layers, [], place("train_data_dir"))
    return resolver.datasets, [*problems, *resolver.problems], warnings


def _from_metadata(
    path: Path, options: DatasetOptions, place: Callable[[str], str], resolution: int | None
) -> tuple[list[DatasetConfig], list[Problem], list[str]]:
    """Make one subset of ``in_json``, with ``train_data_dir`` as its ``image_dir``."""
    resolver = _Resolver(options, place, Path(), resolution)
    if options.reg_data_dir is not None:
        resolver.problems.append(
            Problem(
                place=place("reg_data_dir"),
                message=f"has no place beside {place('in_json')}",
                remedy="write a --dataset_config with a dataset for each",
            )
        )
    folder = options.train_data_dir
    table = SubsetTable(image_dir=None if folder is None else str(folder), metadata_file=str(path))
    called = {"image_dir": "train_data_dir", "metadata_file": "in_json", "": "in_json"}
    resolver.add([Layer(table, lambda name: place(called[name]))], [], place("in_json"))
    return resolver.datasets, resolver.problems, []


def _key_place(places: KeyPlaces, table: KeyPath, name: str) -> str:
    return places.of((*table, name) if name else table)


def _folder_place(table: SubsetTable, place: Callable[[str], str], name: str) -> str:
    folder = Path(table.image_dir or "")
    if name == "is_reg":
        return place("reg_data_dir")
    return f"the name of folder {folder.name}" if name else str(folder)


class _Resolver:
    """Turns tables into configurations, collecting mistakes."""

    def __init__(
        self,
        options: DatasetOptions,
        place: Callable[[str], str],
        base: Path,
        resolution: int | None,
    ) -> None:
        self.resolution = resolution
        self.options = options
        self.place = place
        self.base = base
        self.datasets: list[DatasetConfig] = []
        self.problems: list[Problem] = []

    def add(self, subsets: Sequence[Layer], outer: Sequence[Layer], where: str) -> None:
        """Resolve one dataset."""
        configs = [config for layer in subsets if (config := self._subset(layer, outer))]
        values = Values(outer, self.options, self.place)
        resolution = values.get("resolution")
        if resolution is None and self.resolution is not None:
            resolution = values.values["resolution"] = (self.resolution, self.resolution)
        if resolution is None:
            self.problems.append(
                Problem(
                    place=self.place("resolution"),
                    message="is required: no training size is given"
                    + (f" for {where}" if outer else ""),
                    remedy="give the one of the base model, such as --resolution 1024",
                )
            )
            return
        batch_size, buckets = values.get("batch_size"), values.fill(BucketOptions)
        self.problems += face_crop_problems(configs, buckets, values.origins["enable_bucket"])
        self.problems += style_problems(configs, where)
        self.datasets.append(
            DatasetConfig(
                place=where,
                subsets=tuple(configs),
                batch_size=batch_size,
                resolution=resolution,
                buckets=buckets,
                validation_split=values.get("validation_split"),
                validation_seed=values.get("validation_seed") or 0,
                values=values.values,
                origins=values.origins,
            )
        )

    def _subset(self, layer: Layer, outer: Sequence[Layer]) -> SubsetConfig | None:
        """Resolve one subset; None if its folder is not there, so that the rest can be scanned."""
        values = Values([layer, *outer], self.options, self.place)
        source = self._source(values, layer)
        if source is None:
            return None
        image_dir, metadata_file = source
        extension, repeats = values.get("caption_extension"), values.get("num_repeats")
        if repeats == 0:
            self.problems.append(
                Problem(
                    place=values.origins["num_repeats"],
                    message=f"is 0, so nothing of {metadata_file or image_dir} would be trained",
                    remedy="set num_repeats of the subset to 1 or more, or leave the subset out",
                )
            )
        is_default = values.origins["caption_extension"] == DEFAULT
        class_tokens = values.get("class_tokens")
        values.values["is_reg"] = is_reg = bool(values.get("is_reg"))
        attributes = values.get("custom_attributes")
        values.get("cache_info")
        subset = SubsetConfig(
            place=layer.place(""),
            image_dir=image_dir,
            metadata_file=metadata_file,
            num_repeats=repeats,
            is_reg=is_reg,
            class_tokens=None if metadata_file else class_tokens,
            caption_extensions=(extension, ".txt") if is_default else (extension,),
            captions=values.fill(CaptionOptions),
            views=values.fill(ViewOptions),
            resize_interpolation=values.get("resize_interpolation"),
            alpha_mask=values.get("alpha_mask"),
            mask_dir=self._mask_folder(values, image_dir, is_reg=is_reg),
            preserves_output=attributes is not None and attributes.diff_output_preservation,
            values=values.values,
            origins=values.origins,
        )
        self.problems += subset_problems(subset, self.options, self.place)
        if metadata_file:
            self.problems += metadata_problems(layer)
        return subset

    def _source(self, values: Values, layer: Layer) -> tuple[Path | None, Path | None] | None:
        """Give the folder and the metadata file of a subset; None if they are not there."""
        given, file = values.get("image_dir"), values.get("metadata_file")
        folder = None if given is None else self._path(given)
        metadata_file = None if file is None else self._path(file)
        problems = []
        if folder is not None:
            problems.append(folder_problem(folder, layer.place("image_dir")))
        if metadata_file is not None:
            place = layer.place("metadata_file")
            problems.append(file_problem(metadata_file, place, METADATA_FILE))
        found = [problem for problem in problems if problem]
        self.problems += found
        return None if found else (folder, metadata_file)

    def _mask_folder(self, values: Values, images: Path | None, *, is_reg: bool) -> Path | None:
        given = values.get("conditioning_data_dir")
        if given is None:
            return None
        folder = self._path(str(given))
        if values.origins["conditioning_data_dir"] == self.place("conditioning_data_dir"):
            # One folder for all subsets: it may hold one for each, and none for regularization.
            if is_reg:
                return None
            inner = folder / images.name if images else folder
            folder = inner if inner.is_dir() else folder
        problem = folder_problem(folder, values.origins["conditioning_data_dir"])
        if problem:
            self.problems.append(problem)
            return None
        return folder

    def _path(self, text: str) -> Path:
        given = expanded(Path(text))
        beside = self.base / given
        return given if given.exists() or not beside.exists() else beside
