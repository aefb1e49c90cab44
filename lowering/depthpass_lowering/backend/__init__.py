"""The ``torch.compile`` backend."""

from depthpass_lowering.backend.dynamo import depthpass_backend

__all__ = ["depthpass_backend"]
