"""State: what a batch of rows carries from one call to the next."""

from depthpass_lowering.state.slots import Slot, Span, State, crop

__all__ = ["Slot", "Span", "State", "crop"]
