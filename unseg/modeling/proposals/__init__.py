"""Mask proposals: what DeepMask, SharpMask and InstanceFCN are made of."""

from unseg.modeling.proposals.outputs import ProposalSettings, as_outputs, make_proposals
from unseg.modeling.proposals.pyramid import TopWindows, grid_windows, to_output, top_windows

__all__ = [
    "ProposalSettings",
    "TopWindows",
    "as_outputs",
    "grid_windows",
    "make_proposals",
    "to_output",
    "top_windows",
]
