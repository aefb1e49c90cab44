"""Noise of a continuous state, z_t = alpha_t z_0 + sigma_t noise: schedules, loss weights, steps back in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_type_hints

import torch
from torch import Tensor

from depthpass.annotations import check
from depthpass.errors import InputError, did_you_mean

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "snr": lambda t: ((1 - t) / t).clamp(max=10),
    "min_snr": lambda t: ((1 - t) / t).clamp(max=5),
    "sqrt_snr": lambda t: ((1 - t) / t).clamp(max=10).sqrt(),
    "inv_snr": lambda t: (t / (1 - t)).clamp(max=10),
    "ddpm_x": lambda t: (1 / (1 - t)).clamp(max=10),
    "karras": lambda t: (1 / (t + 0.1)).clamp(max=10),
}
"""Weights of the state's loss by time, with the bounds of the public code."""

SAMPLERS = ("ode", "sde", "renoise")


@dataclass(frozen=True)
class CoevolutionSettings:
    """What a saved model is built from again.

    Attributes:
        latent: width of the continuous state.
        schedule: of its noise, z_t = alpha z_0 + sigma noise: ``vp`` (sqrt(1-t), sqrt(t)) or ``flow`` (1-t, t).
        weight: of its loss by time.
        cont_weight, disc_weight: g_c and g_d.
        clip: bounds of the weight 1/t of the token loss; None = the exact bound of the likelihood.
        drop: chance that a row trains without its state, for guidance.
    """

    latent: int
    schedule: Literal["vp", "flow"] = "vp"
    weight: str = "uniform"
    cont_weight: float = 1.0
    disc_weight: float = 1.0
    clip: tuple[float, float] | None = None
    drop: float = 0.0

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            object.__setattr__(self, name, check(f"coevolution: {name}", getattr(self, name), annotation))
        for name, value, known in (("schedule", self.schedule, ("vp", "flow")), ("weight", self.weight, WEIGHTS)):
            if value not in known:
                raise InputError(f"coevolution: {name}: expected one of {', '.join(known)}, got {value!r}."
                                 f"{did_you_mean(str(value), known)}")
        if self.latent < 1 or not 0 <= self.drop < 1:
            raise InputError(f"coevolution: expected latent of at least 1 and drop in [0, 1), got {self.latent} and {self.drop}.")


def continuous(time: Tensor, schedule: str) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t: ``vp`` sqrt(1 - t), sqrt(t); ``flow`` 1 - t, t."""
    return ((1 - time).sqrt(), time.sqrt()) if schedule == "vp" else (1 - time, time)


def weight_of(time: Tensor, name: str) -> Tensor:
    """Weight of the state's loss."""
    return WEIGHTS[name](time)


def moved(
    state: Tensor, clean: Tensor, now: float, then: float, schedule: str, sampler: str, generator: torch.Generator | None = None
) -> Tensor:
    """The state at an earlier time, given what it would be without noise.

        ode       the noise that is in it, less of it (DDIM):  alpha_s z0 + sigma_s / sigma_t (z_t - alpha_t z0)
        sde       a draw from q(z_s | z_t, z0) (DDPM): with a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2,
                  mean a sigma_s^2 / sigma_t^2 z_t + alpha_s v / sigma_t^2 z0, variance v sigma_s^2 / sigma_t^2
        renoise   fresh noise: alpha_s z0 + sigma_s noise

    Raises:
        InputError: an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (float(x) for x in continuous(torch.tensor(t, dtype=torch.float64), schedule)) for t in (now, then)
    )
    if sampler == "ode":
        return alpha_s * clean + sigma_s / sigma_t * (state - alpha_t * clean)
    noise = torch.randn(state.shape, generator=generator, dtype=state.dtype, device=state.device)
    if sampler == "renoise":
        return alpha_s * clean + sigma_s * noise
    ratio = alpha_t / alpha_s
    left = sigma_t**2 - ratio**2 * sigma_s**2
    mean = ratio * sigma_s**2 / sigma_t**2 * state + alpha_s * left / sigma_t**2 * clean
    return mean + (left * sigma_s**2 / sigma_t**2) ** 0.5 * noise
