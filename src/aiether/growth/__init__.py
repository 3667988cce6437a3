"""Growth: a trigger says when, a plan says what, `migrate` does it."""

from __future__ import annotations

from .config import GrowthConfig, LrPolicy, Moments
from .controller import GrowthController
from .families import FAMILIES, Family, block_tensors, family_of
from .initialise import INITIALISERS, BlockSource, initialise_output_projections, silenced
from .lag import Candidate, Trial, trial_steps
from .lineage import LayerRecord, Lineage
from .lr_policy import LrFactors, lr_factors
from .matching import check_blocks_match, index_attributes
from .migrate import (
    Migration,
    TrainingState,
    check_depth,
    check_routed_groups,
    grow_config,
    make_layer,
    migrate,
    origins,
    renames,
    shared_names,
    training_family,
)
from .moments import FROM_ZERO, new_moments
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
    "FROM_ZERO",
    "GROWTH_PRESETS",
    "INITIALISERS",
    "PLACEMENTS",
    "TRIGGERS",
    "BlockSource",
    "Candidate",
    "Decision",
    "Family",
    "GrowthConfig",
    "GrowthController",
    "GrowthPlan",
    "LayerOrigin",
    "LayerRecord",
    "Lineage",
    "LrFactors",
    "LrPolicy",
    "Migration",
    "Moments",
    "Observation",
    "Phases",
    "PlanPlacement",
    "TrainingState",
    "Trial",
    "TriggerState",
    "block_tensors",
    "check_blocks_match",
    "check_depth",
    "check_routed_groups",
    "decide",
    "depth_of",
    "depth_schedule",
    "family_of",
    "frontier",
    "grow_config",
    "growth_warnings",
    "index_attributes",
    "initialise_output_projections",
    "lr_factors",
    "make_layer",
    "migrate",
    "new_moments",
    "next_depth",
    "origins",
    "plan_growth",
    "planned_depth",
    "relative_improvement",
    "renames",
    "shared_names",
    "silenced",
    "training_family",
    "trial_steps",
]
