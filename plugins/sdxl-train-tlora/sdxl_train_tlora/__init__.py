"""T-LoRA for sdxl-train: a LoRA whose rank depends on the timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Network, Problem, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import LoadedModel, RunConfig
    from sdxl_train_tlora.adapter import TimestepAdapter

DEFAULT_RANK = 16


class TLora(Network):
    """T-LoRA (Soboleva et al. 2025, arXiv:2507.05964): fewer ranks at noisier timesteps.

    ``r(t) = min_rank + floor((r - min_rank) (1 - t/T)^rank_power)`` of the ``r`` ranks act at
    timestep ``t`` of ``T`` (equation 5 of the paper for a power of 1).
    """

    min_rank: int = Field(1, ge=1, description="Ranks that act at the noisiest timestep.")
    rank_power: float = Field(
        1.0, gt=0, description="Above 1, the ranks come back later: closer to the image."
    )
    orthogonal: bool = Field(
        True, description="Begin with orthonormal directions, so that ranks matter alike."
    )

    @property
    def rank(self) -> int:
        """Number of ranks in the file."""
        return self.network_dim or DEFAULT_RANK

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse more ranks at the least than there are."""
        if self.min_rank > self.rank:
            yield Problem(
                place=config.place("network_args.min_rank"),
                message=f"{self.min_rank} ranks of {self.rank} cannot act",
                remedy=f"at most {self.rank}, or raise --network_dim",
            )

    def build(self, model: LoadedModel) -> TimestepAdapter:
        """Attach a new network to the linear layers of the parts that train."""
        from sdxl_train_tlora.adapter import TimestepAdapter

        return TimestepAdapter(self, model)


@hookimpl
def register_networks() -> dict[str, type[Network]]:
    """Give the network by its name."""
    return {"tlora": TLora}
