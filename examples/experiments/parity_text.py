"""Running parity again, on a model that was pre-trained on text: nothing of the recipe changes but what came before.

Every arm starts from one small language model of a seed, trained here on the language reference that ships with Python, with
attention that sees every row whole; its weights stand in OUT/bases and are made again wherever they are missing.
"""

from __future__ import annotations

from examples.experiments.parity import state
from examples.harness.bridges import tracking

EXPERIMENT = tracking("parity on a model pre-trained on text: TurboConn against stock", state)
