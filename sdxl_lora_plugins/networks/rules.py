"""Rules by the names of layers: which are adapted, with what rank, alpha and learning rate.

A rule is a regular expression and what it says: ``attn2 dim=8 lr=1e-4``, ``ff_net exclude``. It is
searched for in a layer's name in files, ``lora_unet_input_blocks_4_1_proj_in``; a dot in it also
fits an underscore. The last rule that matches a layer says everything about it.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from sdxl_train import Field, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Rule(BaseModel):
    """What is said about the layers that match."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    match: str
    """Regular expression, searched for in the layer's name in files."""
    include: bool = False
    """Adapt every linear layer and convolution that matches, whatever it is a part of."""
    dim: int | None = Field(None, ge=0)
    """Rank; 0 leaves the layers out, None stands for what the other options say."""
    alpha: float | None = Field(None, ge=0)
    """Alpha; 0 means the rank."""
    lr: float | None = Field(None, ge=0)
    """Learning rate; 0 leaves the layers out."""

    @property
    def excludes(self) -> bool:
        """Whether the layers are left out."""
        return self.dim == 0 or self.lr == 0


def last_match(rules: Sequence[Rule], name: str) -> int | None:
    """Give the index of the rule that says how a layer is adapted; None where none matches."""
    return next(
        (index for index in reversed(range(len(rules))) if re.search(rules[index].match, name)),
        None,
    )


def require_matches(rules: Sequence[Rule], names: Iterable[str]) -> None:
    """Refuse rules that match nothing.

    Args:
        rules: The rules.
        names: Names of all layers of the parts that train.

    Raises:
        UserError: With names that are close to what was meant.
    """
    known = list(names)
    for rule in rules:
        if not any(re.search(rule.match, name) for name in known):
            near = _close(rule.match, known)
            raise UserError.of(
                "--network_args rules",
                f"'{rule.match}' matches no layer of the parts that train",
                f"close are {', '.join(near)}" if near else f"a name is for example {known[0]}",
            )


def _close(pattern: str, names: Iterable[str]) -> list[str]:
    """Give the pieces of names that are most like the longest plain piece of an expression."""
    wanted = max(re.findall(r"[A-Za-z0-9_]+", pattern.replace(".", "_")) or [""], key=len)
    length = wanted.strip("_").count("_") + 1
    pieces: set[str] = set()
    for name in names:
        words = name.split("_")
        pieces.update("_".join(words[i : i + length]) for i in range(len(words) - length + 1))
    return difflib.get_close_matches(wanted, sorted(pieces), n=3)


def _read(value: object) -> object:
    """Read ``attn2 dim=8; ff_net exclude``, a list of such texts, or a list of tables."""
    if isinstance(value, str):
        value = [text for text in value.split(";") if text.strip()]
    if isinstance(value, list):
        return [_read_one(item) if isinstance(item, str) else _plain(item) for item in value]
    return value


def _read_one(text: str) -> Any:
    expression, *words = text.split()
    said: dict[str, Any] = {"match": expression}
    for word in words:
        name, equals, number = word.partition("=")
        if not equals and name in ("include", "exclude"):
            said[name] = True
        elif equals and name in ("dim", "alpha", "lr"):
            try:
                said[name] = int(number) if name == "dim" else float(number)
            except ValueError:
                kind = "a whole number" if name == "dim" else "a number"
                raise ValueError(f"rule '{text.strip()}': '{number}' is not {kind}") from None
        else:
            raise ValueError(
                f"rule '{text.strip()}': '{word}' is not one of include, exclude, dim=N, alpha=X, "
                "lr=X"
            )
    return _plain(said)


def _plain(item: Any) -> Any:
    """Write ``exclude`` as a rank of 0."""
    if isinstance(item, dict) and "exclude" in item:
        item = dict(item)
        if item.pop("exclude") is True:
            if item.keys() - {"match"}:
                raise ValueError(f"rule '{item.get('match')}': exclude goes with nothing else")
            item["dim"] = 0
    return item


def _check(rules: list[Rule]) -> list[Rule]:
    for rule in rules:
        try:
            re.compile(rule.match)
        except re.error as error:
            raise ValueError(f"'{rule.match}' is no regular expression: {error}") from None
        if rule.model_fields_set == {"match"}:
            raise ValueError(f"rule '{rule.match}' says nothing: add include, exclude, dim=N, ...")
        if rule.include and rule.excludes:
            raise ValueError(f"rule '{rule.match}' includes and leaves out the same layers")
    return rules


Rules = Annotated[
    list[Rule],
    BeforeValidator(_read, json_schema_input_type=str | list[str | dict[str, Any]]),
    AfterValidator(_check),
    WithJsonSchema({"type": "string"}, mode="serialization"),
]
"""Rules in the order in which they are given."""
