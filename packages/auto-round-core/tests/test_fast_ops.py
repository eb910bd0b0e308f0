"""The faster attention and norms against torch's own in double precision, forwards and backwards."""

import threading

import pytest
import torch
import torch.nn.functional as F
from auto_round.quantization._fast_ops import fast_training
from torch import Tensor, nn


class Counting(nn.Module):
    """Attention as a module; tells whether torch's own was called."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


def heads(count: int, tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, tokens, width, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("tokens", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_agrees_with_torch_in_double_precision(tokens, kv_heads, scale):
    q, k, v = heads(4, tokens, 16, 0), heads(kv_heads, tokens, 16, 1), heads(kv_heads, tokens, 16, 2)
    grad = torch.randn(2, 4, tokens, 16, generator=torch.Generator().manual_seed(3))
    options = {"is_causal": True, "scale": scale, "enable_gqa": kv_heads != 4}
    block = Counting()
    with fast_training(block):
        out = block(q, k, v, **options)
    assert "BandedAttention" in str(out.grad_fn)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, **options)
    expected_gradients = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for own, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=1e-4, atol=1e-5)


def test_attention_in_bfloat16_is_within_its_rounding():
    q, k, v = (heads(4, 256, 32, seed, torch.bfloat16) for seed in range(3))
    grad = torch.randn(2, 4, 256, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True)
    references = torch.autograd.grad(expected, wide, grad.double())
    with fast_training(nn.Module()):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gradients = torch.autograd.grad(out, (q, k, v), grad)
    for own, reference in zip((out, *gradients), (expected, *references), strict=True):
        assert float((own.detach().double() - reference.detach()).norm() / reference.detach().norm()) < 1e-2


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, {"is_causal": True, "dropout_p": 0.5}],
)
def test_other_attention_is_left_to_torch(options):
    q, k, v = (heads(2, 6, 8, seed) for seed in range(3))
    with fast_training(nn.Module()):
        torch.manual_seed(0)
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert "BandedAttention" not in str(out.grad_fn)
    torch.manual_seed(0)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **options))


def test_without_gradients_torchs_own_is_used():
    q, k, v = (heads(2, 6, 8, seed).detach() for seed in range(3))
    with fast_training(nn.Module()):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int, shift: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.5)
        self.variance_epsilon, self.shift, self.calls = eps, shift, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (self.weight.float() + self.shift)).to(x.dtype)


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_agree_with_the_module_forwards_and_backwards(shift, dtype):
    norm = LlamaRMSNorm(48, shift).to(dtype).requires_grad_(False)
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = norm(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, grad)
    with fast_training(nn.Sequential(norm)):
        calls = norm.calls
        out = norm(x)
        assert norm.calls == calls  # replaced
        (gradient,) = torch.autograd.grad(out, x, grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)
    assert "forward" not in vars(norm)


def test_a_norm_that_computes_something_else_is_left_alone():
    norm = OtherRMSNorm(32)
    x = torch.randn(2, 32)
    with fast_training(nn.Sequential(norm)):
        assert "forward" not in vars(norm)
        assert torch.equal(norm(x), OtherRMSNorm(32)(x))


def test_norms_are_given_back_after_an_error():
    norm = LlamaRMSNorm(32)
    replaced: list[bool] = []

    def fail() -> None:
        with fast_training(nn.Sequential(norm)):
            replaced.append("forward" in vars(norm))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert replaced == [True]
    assert "forward" not in vars(norm)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Rotating(nn.Module):
    """Finds the function in its module at each call, as transformers' attention does."""

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_agree_forwards_and_backwards(dtype):
    # Seen through transposed memory, as attention has them.
    q, k = (
        heads(count, 6, 16, count, dtype).transpose(1, 2).contiguous().transpose(1, 2) for count in (4, 2)
    )
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(1, 6, 16, generator=generator).to(dtype) for _ in range(2))
    grads = [torch.randn(part.shape, generator=generator).to(dtype) for part in (q, k)]
    block = Rotating()
    with fast_training(block):
        out = block(q, k, cos, sin)
        gradients = torch.autograd.grad(out, (q, k), grads)
    assert "Rotated" in str(out[0].grad_fn)
    wide = [part.detach().double().requires_grad_() for part in (q, k)]
    expected = block(*wide, cos.double(), sin.double())
    assert "Rotated" not in str(expected[0].grad_fn)
    expected_gradients = torch.autograd.grad(expected, wide, [grad.double() for grad in grads])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    for own, reference in zip((*out, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(own.detach().double(), reference.detach(), **tolerance)


def test_other_threads_keep_the_functions_that_they_had():
    q, k = heads(2, 6, 16, 0), heads(2, 6, 16, 1)
    cos = sin = torch.ones(1, 6, 16)
    seen: list[str] = []

    def look() -> None:
        seen.append(str(Rotating()(q, k, cos, sin)[0].grad_fn))

    with fast_training(Rotating()):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert "Rotated" in seen[0]
    assert "Rotated" not in seen[1]


def test_threads_that_overlap_leave_nothing_behind():
    original = globals()["apply_rotary_pos_emb"]
    begun, ended = threading.Event(), threading.Event()

    def longer() -> None:
        with fast_training(Rotating()):
            begun.set()
            ended.wait(10)

    thread = threading.Thread(target=longer)
    with fast_training(Rotating()):
        thread.start()
        begun.wait(10)
    ended.set()
    thread.join()
    assert globals()["apply_rotary_pos_emb"] is original


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

    return turn(q), turn(k)


def test_positions_that_rotate_otherwise_are_left_alone(monkeypatch):
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", interleaved)
    with fast_training(Rotating()):
        assert globals()["apply_rotary_pos_emb"] is interleaved


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "mistral"])
def test_a_models_gradients_are_those_of_its_own_forward(random_model, calibration_ids, family):
    # Norms after a layer share their incoming gradient with the residual beside them.
    model = random_model(family)

    def gradients():
        model.zero_grad()
        hidden = model.model(calibration_ids, use_cache=False).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        return {name: weight.grad for name, weight in model.model.layers.named_parameters()}

    for name, weight in model.named_parameters():
        # The gains of norms are never trained.
        weight.requires_grad_("norm" not in name)
    expected = gradients()
    with fast_training(model):
        found = gradients()
    for name, gradient in expected.items():
        if gradient is not None:
            error = float((found[name] - gradient).norm() / gradient.norm())
            assert error < 1e-4, (name, error)
