"""One step of each optimizer, in float32 arithmetic."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from halfbyte.functional import dequantize_blockwise, quantize_blockwise

OPTIMIZERS = ("adam", "ademamix", "adagrad", "lamb", "lars", "lion", "momentum", "rmsprop")

_DECOUPLED = ("adam", "ademamix", "lamb", "lion")
_TWO_STATES = ("adam", "ademamix", "lamb")
_BLOCKSIZE = 256


def update_32bit(
    name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    param_norm: float | None = None,
) -> None:
    """Update `p` and its states, in place.

    Weight decay is decoupled for Adam, AdEMAMix, LAMB and Lion (`p *= 1 - lr * weight_decay`, arXiv 1711.05101) and
    part of the gradient for the others. With `max_unorm`, an update whose norm is more than `max_unorm` times the
    parameter's norm is scaled down to that (LAMB, arXiv 1904.00962; LARS, arXiv 1708.03888).

    Args:
        name: One of `OPTIMIZERS`.
        g: The gradient, of the parameter's shape.
        p: The parameter.
        state1: float32: first moment; Adagrad's and RMSprop's squares; AdEMAMix's two first moments, `[2, *shape]`.
        state2: float32: second moment of Adam, LAMB and AdEMAMix.
        beta1: Decay of the first state, or the momentum.
        beta2: Decay of the second state.
        beta3: Decay of AdEMAMix's slow moment.
        alpha: Weight of AdEMAMix's slow moment.
        eps: Added to the denominator.
        weight_decay: See above.
        step: Counts from 1.
        lr: Learning rate.
        gnorm_scale: The gradient is multiplied by it.
        unorm_vec: float32 `[1]`: receives the square of the update's norm when `max_unorm` is positive.
        max_unorm: See above; 0 for no limit.
        skip_zeros: Not supported.
        param_norm: The norm of `p`, where the caller knows it.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer_name must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if skip_zeros:
        raise NotImplementedError("skip_zeros must be False, got True")
    if g.shape != p.shape:
        raise ValueError(f"g must have the shape of p, {list(p.shape)}, got {list(g.shape)}")
    if name in _TWO_STATES and state2 is None:
        raise ValueError(f"state2 must be a tensor for {name}, got None")
    value = p.detach().float()
    gradient = g.detach().float()
    if gnorm_scale != 1.0:
        gradient = gradient * gnorm_scale
    if weight_decay > 0.0:
        if name in _DECOUPLED:
            decayed = value * (1.0 - lr * weight_decay)
        else:
            gradient = gradient.add(value, alpha=weight_decay)
            decayed = value
    else:
        decayed = value
    update = _direction(name, gradient, state1, state2, beta1, beta2, beta3, alpha, eps, step)
    if max_unorm > 0.0:
        norm, limit = update.norm(), max_unorm * (value.norm() if param_norm is None else param_norm)
        if unorm_vec is not None:
            unorm_vec.copy_(norm.square().reshape(unorm_vec.shape))
        if name not in _TWO_STATES:
            limit = limit + eps
        update = update * torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    p.data.copy_(decayed.sub(update, alpha=lr))


def _direction(
    name: str,
    g: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
) -> Tensor:
    """What the learning rate is multiplied with; the states go one step on."""
    if name in ("adam", "lamb"):
        assert state2 is not None
        state1.lerp_(g, 1.0 - beta1)
        state2.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        root = state2.sqrt().div_(sqrt(1.0 - beta2**step)).add_(eps)
        return (state1 / (1.0 - beta1**step)).div_(root)
    if name == "ademamix":  # arXiv 2409.03137
        assert state2 is not None
        fast, slow = state1[0], state1[1]
        fast.lerp_(g, 1.0 - beta1)
        slow.lerp_(g, 1.0 - beta3)
        state2.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        root = state2.sqrt().div_(sqrt(1.0 - beta2**step)).add_(eps)
        return (fast / (1.0 - beta1**step)).add_(slow, alpha=alpha).div_(root)
    if name in ("momentum", "lars"):
        if step == 1:
            state1.copy_(g)
        else:
            state1.mul_(beta1).add_(g)
        return state1.clone()
    if name == "lion":  # arXiv 2302.06675
        sign = state1.lerp(g, 1.0 - beta1).sign_()
        state1.lerp_(g, 1.0 - beta2)
        return sign
    if name == "rmsprop":
        state1.mul_(beta1).addcmul_(g, g, value=1.0 - beta1)
    else:  # adagrad
        state1.addcmul_(g, g)
    return g / state1.sqrt().add_(eps)


class _State:
    """A state in 8 bits: codes in blocks of 256, the values of the codes, and scales.

    AdEMAMix's two first moments are codes `[2, …]` with scales `[2, blocks]`: no block has values of both.
    """

    def __init__(self, codes: Tensor, values: Tensor, absmax: Tensor) -> None:
        self.values = values
        self.parts = list(zip(codes, absmax, strict=True)) if absmax.dim() == 2 else [(codes, absmax)]
        self.shape = codes.shape

    def read(self) -> Tensor:
        """The state in float32."""
        wide = [
            dequantize_blockwise(codes, absmax=absmax, code=self.values, blocksize=_BLOCKSIZE)
            for codes, absmax in self.parts
        ]
        return torch.stack(wide).view(self.shape) if len(wide) > 1 else wide[0].view(self.shape)

    def write(self, state: Tensor) -> None:
        """Quantize it into the same memory."""
        for part, (codes, absmax) in zip(state if len(self.parts) > 1 else (state,), self.parts, strict=True):
            new, scales = quantize_blockwise(part, code=self.values, blocksize=_BLOCKSIZE)
            codes.copy_(new)
            absmax.copy_(scales.absmax)


def update_8bit_blockwise(
    name: str,
    g: Tensor,
    p: Tensor,
    first: tuple[Tensor, Tensor, Tensor],
    second: tuple[Tensor | None, Tensor | None, Tensor | None],
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """`update_32bit` of states that are kept in 8 bits: each is `codes, values of the codes, scales`.

    There is no limit of the update's norm: LAMB and LARS are Adam and momentum here, as in bitsandbytes.
    """
    codes, values, absmax = second
    states = [_State(*first)]
    if codes is not None and values is not None and absmax is not None:
        states.append(_State(codes, values, absmax))
    wide = [state.read() for state in states]
    update_32bit(
        name, g, p, wide[0], wide[1] if len(wide) > 1 else None, beta1, beta2, beta3, alpha, eps, weight_decay, step,
        lr, gnorm_scale, skip_zeros=skip_zeros,
    )  # fmt: skip
    for state, value in zip(states, wide, strict=True):
        state.write(value)
