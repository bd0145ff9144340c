"""Attention as data: a policy (a table) becomes a plan (index arithmetic) for a kernel."""

from cocoa_pl.attention.kernels import TEXT_ATTENTION, VISION_ATTENTION, attend
from cocoa_pl.attention.plan import Plan, make_plan, self_plan
from cocoa_pl.attention.policy import SEGMENTS, Policy, dense_mask, grid_text, segment_letters

__all__ = [
    "SEGMENTS",
    "TEXT_ATTENTION",
    "VISION_ATTENTION",
    "Plan",
    "Policy",
    "attend",
    "dense_mask",
    "grid_text",
    "make_plan",
    "segment_letters",
    "self_plan",
]
