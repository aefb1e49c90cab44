"""Cost of programs: FLOPs, bytes, parameters and steps, counted on captured graphs and symbolic in rows and tokens."""

from depthpass.analysis.cost.build import cost, visit_equivalents
from depthpass.analysis.cost.flops import CLASSES, Count, Experts, count
from depthpass.analysis.cost.program import Cost, Quantity, RegionCost, Row
from depthpass.analysis.cost.stock import ModelCost, PartCost, model_cost
from depthpass.analysis.cost.symbols import CONVENTIONS, AttentionSite

__all__ = [
    "CLASSES", "CONVENTIONS", "AttentionSite", "Cost", "Count", "Experts", "ModelCost", "PartCost", "Quantity",
    "RegionCost", "Row", "cost", "count", "model_cost", "visit_equivalents",
]
