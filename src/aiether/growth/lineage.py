"""Where every layer comes from: born when, from whom, how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .plan import GrowthPlan


@dataclass(frozen=True)
class LayerRecord:
    """One layer's birth. `parent` is the id of the layer that it was made from; None for the first ones."""

    id: int
    born_step: int
    parent: int | None
    init: str
    placement: str


@dataclass(frozen=True)
class Lineage:
    """The layers of a model in their current order, bottom first. Ids never change and are never reused."""

    records: tuple[LayerRecord, ...]

    @classmethod
    def start(cls, depth: int) -> Lineage:
        """The lineage of a model that has not grown."""
        return cls(tuple(LayerRecord(layer, 0, None, "random", "initial") for layer in range(depth)))

    @property
    def depth(self) -> int:
        return len(self.records)

    def grow(self, plan: GrowthPlan, step: int) -> Lineage:
        """The lineage after `plan` was carried out at `step`."""
        if plan.depth_before != self.depth:
            raise ValueError(f"the plan is for {plan.depth_before} layers, the lineage has {self.depth}")
        next_id = 1 + max(record.id for record in self.records)
        records: list[LayerRecord] = []
        for origin in plan.layers:
            source = self.records[origin.source]
            if origin.is_new:
                source = LayerRecord(next_id, step, source.id, plan.init, plan.placement)
                next_id += 1
            records.append(source)
        return Lineage(tuple(records))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` inverts it."""
        return {"records": [asdict(record) for record in self.records]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Lineage:
        return cls(tuple(LayerRecord(**record) for record in data["records"]))
