"""``sdxl-train resize``: a network of lower rank."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Literal

from sdxl_lora_plugins.commands.written import (
    WritingCommand,
    base_or_none,
    labelled,
    most_rank,
    no_plain_lora,
    number,
    progress,
    require,
    require_values,
    stored_dtype,
)
from sdxl_lora_plugins.model import SDXL
from sdxl_train import Field, Problem, UserError
from sdxl_train.ldm import open_networks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_lora_plugins.commands.recipe import Recipe
    from sdxl_lora_plugins.commands.resize_run import Cut, Whole
    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_lora_plugins.files.plain import PlainModule
    from sdxl_train.ldm import Layer, NetworkFile


class Resize(WritingCommand):
    """Lower the ranks of a network, layer by layer, to what its deltas need.

    Each delta is decomposed into singular values and the largest are kept: the best matrix of that
    rank. The result is a plain LoRA in kohya's naming, whatever the network was.

    Either one network to --save_to with --new_rank; or, with a recipe, any number of networks to a
    file or folder: ``resize base.safetensors a.safetensors -r fro_ckpt=1,thr=-3.55 -o folder``.
    """

    positional: ClassVar[tuple[str, ...]] = ("model",)
    short: ClassVar[Mapping[str, str]] = {**WritingCommand.short, "r": "recipe"}

    model: list[Path] = Field(
        min_length=1,
        description="The network; with a recipe several, and the base model. A sum of LoRAs is "
        "one: a.safetensors:0.7,b.safetensors:0.3.",
    )
    new_rank: int | None = Field(
        None, ge=1, description="Rank of every layer, or the most with a method or a recipe."
    )
    new_conv_rank: int | None = Field(
        None, ge=1, description="The same for 3x3 convolutions; new_rank if not given."
    )
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = Field(
        None,
        description="Choose each layer's rank: sv_ratio keeps singular values of at least the "
        "largest / dynamic_param; sv_fro and sv_cumulative the fewest that hold this share of the "
        "Frobenius norm, or of the sum of all.",
    )
    dynamic_param: float | None = Field(None, gt=0, description="What the method needs.")
    recipe: str | None = Field(
        None,
        description="Choose ranks by scores, over all layers: fro_ckpt=1,thr=-3.5; -r for short. "
        "Several, separated by colons, give a file each.",
    )
    sd_model: Path | None = Field(
        None,
        description="The base model, for recipes, and where the deltas depend on it (DoRA, OFT, "
        "IA3).",
    )

    def run(self) -> int:
        """Decompose, cut and write."""
        from sdxl_lora_plugins.commands.recipe import parse_recipes

        recipes = parse_recipes(self.recipe, "--recipe") if self.recipe else []
        base, words = self._sources()
        sums = [weighted(word) for word in words]
        paths = [path for parts in sums for path, _ in parts]
        problems = [*self._target_problems(len(sums), paths, recipes)]
        problems += self._rank_problems(recipes, base)
        files = open_networks(paths, SDXL, problems)
        require(problems + no_plain_lora(files, has_base=base is not None))
        opened_files = iter(files)
        pairs = [[(next(opened_files), ratio) for _, ratio in parts] for parts in sums]
        require([problem for parts in pairs for problem in _sum_problems(parts)])
        require_values(files)
        with base_or_none(base) as opened:
            for parts in pairs:
                with self._summed(parts) as file:
                    for recipe in recipes:
                        self._by_recipe(file, opened, recipe)
                    if not recipes:
                        self._by_rank(file, opened)
        return 0

    def _sources(self) -> tuple[Path | None, list[Path]]:
        """Tell the base model from the networks: it may stand among them, as in other tools."""
        if self.sd_model is not None:
            return self.sd_model, self.model
        bases = [path for path in self.model if _is_base(path)]
        networks = [path for path in self.model if path not in bases[:1]]
        return (bases[0] if bases else None), networks

    @contextmanager
    def _summed(self, parts: Sequence[tuple[NetworkFile, float]]) -> Iterator[NetworkFile]:
        """Give a network, or a file of the sum of several while it is needed.

        The sum is exact but for the precision, which is that of the result.
        """
        first, ratio = parts[0]
        if len(parts) == 1 and ratio == 1.0:
            yield first
            return
        from sdxl_lora_plugins.commands.merge_run import merged_modules
        from sdxl_lora_plugins.files.plain import write_plain
        from sdxl_train.ldm import NetworkFile

        names = dict.fromkeys(name for file, _ in parts for name in file.modules)
        dtype = self.dtype_or(stored_dtype(first))
        title = "+".join(f"{file.path.stem}_{ratio:g}" for file, ratio in parts)
        with TemporaryDirectory(prefix="sdxl-train-") as folder:
            path = Path(folder) / f"{title}.safetensors"
            write_plain(path, merged_modules(parts, names, None), first.metadata, dtype=dtype)
            yield NetworkFile.open(path, SDXL)

    def _target_problems(
        self, count: int, paths: Sequence[Path], recipes: Sequence[Recipe]
    ) -> Iterator[Problem]:
        if not count:
            yield Problem(place="--model", message="names no network, only the base model")
        is_file = self.save_to.suffix == ".safetensors"
        if is_file and count <= 1 and len(recipes) <= 1:
            yield from self.place_problems(self.save_to, paths)
        elif not recipes:
            yield from self.output_problems(paths)
            if count > 1:
                yield Problem(
                    place="--model",
                    message=f"{count} networks for one --save_to",
                    remedy="resize one at a time, or give a --recipe and a folder",
                )
        elif is_file:
            yield Problem(
                place="--save_to",
                message=f"is one file for {number(count, 'network')} and "
                f"{number(len(recipes), 'recipe')}",
                remedy="name a folder",
            )
        elif not self.save_to.is_dir():
            yield Problem(
                place="--save_to",
                message=f"there is no folder {self.save_to}",
                remedy="make it first, or name a .safetensors file",
            )

    def _rank_problems(self, recipes: Sequence[Recipe], base: Path | None) -> Iterator[Problem]:
        if not recipes and self.new_rank is None:
            yield Problem(
                place="--new_rank",
                message="is required without a --recipe",
                remedy="give a rank, or -r fro_ckpt=1,thr=-3.5 and the base model",
            )
        if recipes and self.dynamic_method is not None:
            yield Problem(
                place="--dynamic_method",
                message="does not go with --recipe: both choose the ranks",
                remedy="leave one of them out",
            )
        if base is None and any(recipe.needs_base for recipe in recipes):
            yield Problem(
                place="--recipe",
                message=f"{self.recipe!r} scores against the base model, and none is named",
                remedy="name it with --sd_model",
            )
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            yield Problem(
                place="--dynamic_method", message="is given only together with --dynamic_param"
            )
        elif self.dynamic_method is not None and self.dynamic_param is not None:
            is_ratio = self.dynamic_method == "sv_ratio"
            if (self.dynamic_param < 1) if is_ratio else (self.dynamic_param > 1):
                bound = "at least 1" if is_ratio else "at most 1"
                yield Problem(
                    place="--dynamic_param",
                    message=f"{self.dynamic_param} is not {bound}, as {self.dynamic_method} needs",
                )

    def _by_rank(self, file: NetworkFile, base: BaseWeights | None) -> None:
        if self.dry_run and self.dynamic_method is None:
            for module in file.modules.values():
                ranks = filter(None, (self._most(module.layer), most_rank(module)))
                print(f"{module.name}: {labelled(module)} -> {min(ranks)}")
            return
        from sdxl_lora_plugins.commands.resize_run import decomposed

        # Only the sum of all singular values needs all of them.
        is_sum = self.dynamic_method == "sv_cumulative"
        most: Callable[[Layer], int | None] = _all if is_sum else self._most
        cuts = (
            whole.cut(whole.svd.cut(self._rank(whole))) for whole in decomposed(file, base, most)
        )
        self._finish(file, cuts, self.save_to, {})

    def _by_recipe(self, file: NetworkFile, base: BaseWeights | None, recipe: Recipe) -> None:
        from sdxl_lora_plugins.commands.resize_run import decomposed
        from sdxl_lora_plugins.files.lowrank import Svd

        most: Callable[[Layer], int | None] = _all if self.new_rank is None else self._most
        itemsize = self.dtype_or(stored_dtype(file)).itemsize
        scores: list[Tensor] = []
        costs: list[int] = []
        wholes = decomposed(file, base, most, with_weights=recipe.needs_base)
        title = f"score {file.path.name}"
        for whole in progress(wholes, total=len(file.modules), title=title):
            found = recipe.scores(whole.svd, whole.weight)
            limit = most(whole.module.layer)
            found[limit:] = float("-inf") if limit is not None else found[limit:]
            scores.append(found)
            costs.append((len(whole.svd.u) + whole.svd.v.shape[1]) * itemsize)
        least = recipe.least(scores, costs)

        def cuts() -> Iterator[Cut]:
            # Decomposed anew: to keep all of the first would take as much memory as the network.
            for whole, score in zip(decomposed(file, base, most), scores, strict=True):
                stays, (u, s, v) = score >= least, whole.svd
                yield whole.cut(Svd(u[:, stays], s[stays], v[stays]), recipe.rescale)

        path = self.save_to
        if path.suffix != ".safetensors":
            path = path / f"{file.path.stem}_{recipe.file_words(least)}.safetensors"
            require(list(self.place_problems(path, [file.path])))
        print(f"{recipe.text}: singular values that score {least:.4f} or more stay")
        self._finish(file, cuts(), path, recipe.metadata(least))

    def _finish(
        self, file: NetworkFile, cuts: Iterable[Cut], path: Path, made: Mapping[str, str]
    ) -> None:
        """Write what is left of the layers, or list it."""
        total, gone = len(file.modules), 0
        if self.dry_run:
            for cut in progress(cuts, total=total, title=path.name):
                print(f"{cut.name}: {cut.told}")
            return

        def modules() -> Iterator[tuple[PlainModule, str]]:
            nonlocal gone
            for cut in cuts:
                if cut.module is not None:
                    yield cut.module, cut.told
                else:
                    gone += 1
                    self.say(f"{cut.name}: {cut.told}")

        note, said = f"resized from {file.path.name}", file.metadata.get("ss_training_comment")
        comment = note if said in (None, "None") else f"{note}; {said}"
        metadata = {**file.metadata, **made, "ss_training_comment": comment}
        dtype = self.dtype_or(stored_dtype(file))
        self.write_lora(modules(), metadata, total=total, dtype=dtype, path=path)
        if gone:
            print(f"left out: {number(gone, 'layer')}")

    def _most(self, layer: Layer) -> int:
        """Give the most ranks of a layer."""
        from sdxl_lora_plugins.files.plain import is_wide

        assert self.new_rank is not None
        return (is_wide(layer) and self.new_conv_rank) or self.new_rank

    def _rank(self, whole: Whole) -> int:
        """Give the rank that the method wants for a layer; at least 1, at most what is allowed."""
        values, most = whole.svd.s, self._most(whole.module.layer)
        if self.dynamic_param is None:
            return most
        if not values[0]:
            return 1
        if self.dynamic_method == "sv_ratio":
            return min(most, int((values >= values[0] / self.dynamic_param).sum()))
        parts, share, total = values.double(), self.dynamic_param, float(values.double().sum())
        if self.dynamic_method == "sv_fro":
            parts, share, total = parts.square(), share**2, whole.norm**2
        return min(most, int((parts.cumsum(0) / total < share).sum()) + 1)


def weighted(word: Path) -> list[tuple[Path, float]]:
    """Read ``a.safetensors:0.7,b.safetensors:0.3``, networks to be summed; or the path of one."""
    if word.exists() or ":" not in str(word):
        return [(word, 1.0)]
    parts = []
    for text in str(word).split(","):
        path, _, number = text.rpartition(":")
        try:
            parts.append((Path(path or number), float(number) if path else 1.0))
        except ValueError:
            raise UserError.of(
                "--model", f"{text!r} has no number behind its colon", "write PATH:WEIGHT"
            ) from None
    return parts


def _sum_problems(parts: Sequence[tuple[NetworkFile, float]]) -> Iterator[Problem]:
    """Yield why networks cannot be summed, where there are several, or one with a weight."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return
    for file, _ in parts:
        others = {m.title for m in file.modules.values() if m.algorithm != "lora" or m.is_dora}
        if others:
            yield Problem(
                place=str(file.path),
                message=f"has layers of {' and '.join(sorted(others))}, whose sum is no "
                "concatenation",
                remedy="merge them first, with sdxl-train merge --new_rank",
            )


def _all(layer: Layer) -> None:
    """Want every singular value of a layer."""


def _is_base(path: Path) -> bool:
    """Tell whether this is a base model and no network."""
    from sdxl_train.ldm import BadFileError, kind_of, read_header

    if path.is_dir():
        return (path / "model_index.json").is_file()
    try:
        return kind_of(read_header(path).shapes, SDXL) == SDXL.checkpoint
    except BadFileError:  # a problem of its own, told where networks are opened
        return False
