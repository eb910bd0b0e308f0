"""Training of weights and scales against torch's own Adam and autograd."""

import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.quantization._block_ap import IntegerBlockAP
from auto_round.quantization._pieces import Scratch
from auto_round.quantization._rtn import quantize_optimized_rtn, quantize_rtn

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_step_writes_what_torchs_adam_leads_to(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(16, 64, generator=generator)
    chosen = LayerSettings(bits=bits, group_size=32, symmetric=symmetric, weight_dtype="int")
    tuner = IntegerBlockAP(w.clone(), chosen, torch.float16, Scratch(CPU), rate=0.02, scale_rate=0.01)
    written = torch.empty_like(w)
    tuner.write(written, keep=True)

    grouped = w.view(16, 2, 32)
    first = quantize_optimized_rtn(w, chosen, torch.float16, torch.ones(64))
    start = first.scale.float()
    zero = torch.full(start.shape, 2.0 ** (bits - 1)) if symmetric else first.zero.float()
    least, most = -zero[..., None] - 0.49, 2**bits - 1 - zero[..., None] + 0.49
    u = torch.clamp(grouped / start[..., None], least, most).requires_grad_()
    growth = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam(
        [{"params": [u], "lr": 0.02}, {"params": [growth], "lr": 0.01}], betas=(0.9, 0.999), eps=1e-30
    )
    steps = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    differing = 0
    for step in range(steps):
        scale = start * (1 + growth)
        stored = scale + (scale.half().float() - scale).detach()
        code = u + (u.round() - u).detach()
        expected = (code * stored[..., None]).flatten(1)
        differing += int((written != expected).sum())
        gradient = torch.randn(w.shape, generator=generator)
        adam.zero_grad()
        # A weight's gradient in units of the scale is the scale times smaller; Adam is blind to that but for
        # the scale's own slow change, which is left out in both.
        expected.backward(gradient)
        u.grad = (u.grad / stored.detach()[..., None]) * start.sign()[..., None]
        tuner.step(gradient, written, 1 - step / steps, keep=False)
        adam.step()
        schedule.step()
        with torch.no_grad():
            u.copy_(torch.clamp(u, least, most))
    # Sums of another order move a few weights that lie on the edge between two codes.
    assert differing <= 2e-3 * steps * w.numel()


@pytest.mark.parametrize("symmetric", [True, False])
def test_training_begins_nearer_to_the_weights_than_the_whole_range(symmetric):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    chosen = LayerSettings(bits=2, group_size=32, symmetric=symmetric, weight_dtype="int")
    written = torch.empty_like(w)
    IntegerBlockAP(w.clone(), chosen, torch.float16, Scratch(CPU), rate=0.02, scale_rate=0.01).write(written)
    plain = quantize_rtn(w, chosen, torch.float16).dequantize()
    assert (written - w).norm() < 0.95 * (plain - w).norm()


def test_weights_beyond_the_codes_come_back():
    # With the tie on the negative side the largest positive weight is beyond the last code.
    w = torch.tensor([[-1.0, 1.0, 0.2, -0.2] * 8])
    chosen = LayerSettings(bits=2, group_size=-1, symmetric=True, weight_dtype="int")
    tuner = IntegerBlockAP(w.clone(), chosen, torch.float16, Scratch(CPU), rate=0.1, scale_rate=1e-9)
    written = torch.empty_like(w)
    tuner.write(written, keep=True)
    gradient = torch.ones_like(w)
    for _ in range(40):
        tuner.step(gradient, written, 1.0, keep=False)
    # All weights were pushed down as far as the codes reach, the clipped ones too.
    assert torch.equal(written, torch.full_like(w, float(written.min())))
    scale = tuner.result().scale.item()
    assert written.min() == -abs(scale) * (2 if scale > 0 else 1)


def test_scales_stay_within_what_can_be_stored():
    w = torch.full((2, 32), 1e-6)
    chosen = LayerSettings(bits=4, group_size=32, symmetric=True, weight_dtype="int")
    tuner = IntegerBlockAP(w, chosen, torch.float16, Scratch(CPU), rate=0.1, scale_rate=0.5)
    written = torch.empty(2, 32)
    for sign in (1, -1):
        for _ in range(10):
            tuner.step(sign * torch.randn(2, 32), written, 1.0, keep=True)
            assert written.isfinite().all()
            scale = tuner.result().scale
            assert scale.isfinite().all()
            assert (scale != 0).all()
