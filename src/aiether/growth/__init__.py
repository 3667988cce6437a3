"""Growth: a trigger says when, a plan says what, `migrate` does it."""

from __future__ import annotations

from .config import GrowthConfig
from .controller import GrowthController
from .families import FAMILIES, Family, block_tensors, family_of
from .initialise import INITIALISERS, BlockSource, initialise_output_projections
from .lineage import LayerRecord, Lineage
from .matching import check_blocks_match, index_attributes
from .migrate import Migration, TrainingState, grow_config, migrate, renames, training_family
from .plan import (
    PLACEMENTS,
    GrowthPlan,
    LayerOrigin,
    PlanPlacement,
    depth_of,
    depth_schedule,
    frontier,
    next_depth,
    plan_growth,
    planned_depth,
)
from .presets import GROWTH_PRESETS
from .protocol import Phases
from .trigger import (
    TRIGGERS,
    Decision,
    Observation,
    TriggerState,
    decide,
    growth_warnings,
    relative_improvement,
)

__all__ = [
    "FAMILIES",
    "GROWTH_PRESETS",
    "INITIALISERS",
    "PLACEMENTS",
    "TRIGGERS",
    "BlockSource",
    "Decision",
    "Family",
    "GrowthConfig",
    "GrowthController",
    "GrowthPlan",
    "LayerOrigin",
    "LayerRecord",
    "Lineage",
    "Migration",
    "Observation",
    "Phases",
    "PlanPlacement",
    "TrainingState",
    "TriggerState",
    "block_tensors",
    "check_blocks_match",
    "decide",
    "depth_of",
    "depth_schedule",
    "family_of",
    "frontier",
    "grow_config",
    "growth_warnings",
    "index_attributes",
    "initialise_output_projections",
    "migrate",
    "next_depth",
    "plan_growth",
    "planned_depth",
    "relative_improvement",
    "renames",
    "training_family",
]
