"""State: what a batch of rows carries from one call to the next."""

from depthpass_lowering.state.slots import Grown, Place, Slot, Span, State, crop

__all__ = ["Grown", "Place", "Slot", "Span", "State", "crop"]
