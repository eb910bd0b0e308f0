"""Models whose weights come and go, against the same models with their weights loaded."""

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_round.config_manager import config_scope
from auto_round.exceptions import CheckpointError, ConfigurationError
from auto_round.low_cpu_mem import HookManager, _hooks, _streamed, register_hooks
from auto_round.low_cpu_mem._batches import run_in_parts
from auto_round.low_cpu_mem._empty import empty_model
from auto_round.low_cpu_mem._streamed import StreamedWeight
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.tensor([[3, 9, 9, 95, 4], [5, 3, 8, 7, 0]])
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**SMALL, "head_dim": 8}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SMALL, "num_local_experts": 3}),
    "bert": ("BertConfig", "BertForMaskedLM", SMALL),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    made: dict[str, tuple[Path, Any]] = {}

    def save(family: str) -> tuple[Path, Any]:
        if family not in made:
            config_name, class_name, fields = FAMILIES[family]
            torch.manual_seed(1)
            model = getattr(transformers, class_name)(getattr(transformers, config_name)(**fields)).eval()
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return save


@pytest.fixture
def llama(saved: Callable[[str], tuple[Path, Any]]) -> Iterator[tuple[Any, HookManager, Tensor]]:
    folder, expected = saved("llama")
    model = empty_model(folder)
    manager = register_hooks(model, folder, "cpu")
    yield model, manager, logits_of(expected)
    manager.remove_hooks()


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def real(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not tensor.is_meta}


def watched(model: nn.Module) -> list[set[str]]:
    """What is loaded whenever a module is called."""
    seen: list[set[str]] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(real(model)))
    return seen


# --- what comes and what goes -----------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_are_those_of_the_loaded_model(
    family: str, clean: bool, saved: Callable[[str], tuple[Path, Any]]
) -> None:
    folder, expected = saved(family)
    model = empty_model(folder)
    manager = register_hooks(model, folder, "cpu", clean_weights=clean)
    assert manager.handles
    # Where the model is, is told by its first weight.
    assert real(model) <= (set() if clean else {next(iter(model.state_dict())), "lm_head.weight"})
    for _ in range(2):
        assert torch.equal(logits_of(model), logits_of(expected))
        assert real(model) == (set() if clean else set(expected.state_dict()))
    manager.remove_hooks()


def test_only_what_is_in_use_is_loaded(saved: Callable[[str], tuple[Path, Any]]) -> None:
    folder, expected = saved("llama")
    model: Any = empty_model(folder)
    seen = watched(model)
    manager = register_hooks(model, folder, "cpu")
    logits_of(model)
    sizes = {name: tensor.numel() for name, tensor in expected.state_dict().items()}
    assert max(sum(sizes[name] for name in names) for names in seen) == sizes["lm_head.weight"]
    # Rows of it, never the whole.
    assert not any("model.embed_tokens.weight" in names for names in seen)
    assert {name for names in seen for name in names} == set(sizes) - {"model.embed_tokens.weight"}
    manager.remove_hooks()


def test_the_experts_are_loaded_for_their_call_alone(saved: Callable[[str], tuple[Path, Any]]) -> None:
    folder, _ = saved("mixtral")
    model: Any = empty_model(folder)
    seen: list[set[str]] = []
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: seen.append(real(model)))
    with_hooks = register_hooks(model, folder, "cpu")
    logits_of(model)
    prefix = "model.layers.1.mlp.experts"
    assert seen == [{f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}]
    with_hooks.remove_hooks()


def test_generation_works_and_the_model_says_where_it_is(
    saved: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, expected = saved("llama")
    for clean in (True, False):
        model: Any = empty_model(folder)
        manager = register_hooks(model, folder, "cpu", clean_weights=clean)
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
        assert torch.equal(model.generate(TOKENS, **options), expected.generate(TOKENS, **options))
        assert model.device == torch.device("cpu")
        manager.remove_hooks()


def test_what_is_real_already_is_used_and_stays(saved: Callable[[str], tuple[Path, Any]]) -> None:
    folder, expected = saved("llama")
    model: Any = empty_model(folder)
    own = nn.Parameter(torch.full((32,), 2.0))
    model.model.norm.weight = own
    bias = nn.Parameter(torch.ones(48))
    model.model.layers[0].mlp.up_proj.bias = bias
    with pytest.raises(CheckpointError, match=r"no tensor for 'model\.layers\.0\.mlp\.up_proj\.bias'"):
        register_hooks(model, folder, "cpu")
    model.model.layers[0].mlp.up_proj.bias = None
    manager = register_hooks(model, folder, "cpu")
    found = logits_of(model)
    assert model.model.norm.weight is own
    assert real(model) == {"model.norm.weight"}
    manager.remove_hooks()
    with torch.no_grad():
        kept = expected.model.norm.weight.detach().clone()
        expected.model.norm.weight.fill_(2)
        assert torch.equal(found, logits_of(expected))
        expected.model.norm.weight.copy_(kept)


def test_real_tensors_beside_loaded_ones_stay(tmp_path: Path) -> None:
    save_file({"weight": torch.eye(3), "bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    model = nn.Linear(3, 3, device="meta")
    bias = nn.Parameter(torch.ones(3))
    model.bias = bias
    manager = register_hooks(model, tmp_path, "cpu")
    for _ in range(2):
        assert model(torch.zeros(1, 3)).tolist() == [[1, 1, 1]]
        assert model.bias is bias
        assert model.weight.is_meta
    manager.remove_hooks()


class Odd(nn.Module):
    """Parameters in lists, in a module that is not called, and in torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = nn.ModuleDict({"one": nn.ModuleList([nn.BatchNorm1d(8)])})
        self.own = nn.Parameter(torch.randn(8))

    def forward(self, inputs: Tensor) -> Tensor:
        mixed = self.attention(inputs, inputs, inputs)[0] * self.scales[0] + self.scales[1]
        return self.inner["one"][0](mixed.mT).mT + self.own


@pytest.mark.parametrize("clean", [True, False])
def test_parameters_outside_of_leaves_are_there_when_they_are_used(tmp_path: Path, clean: bool) -> None:
    torch.manual_seed(0)
    expected = Odd()
    expected(torch.randn(4, 3, 8))
    expected.eval()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Odd().eval()
    manager = register_hooks(model, tmp_path, "cpu", clean_weights=clean)
    inputs = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(model(inputs), expected(inputs))
    assert real(model) == (set() if clean else set(expected.state_dict()))
    manager.remove_hooks()


# --- streamed weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_head_computes_in_chunks(
    saved: Callable[[str], tuple[Path, Any]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved("llama")
    monkeypatch.setattr(_hooks, "STREAMED_BYTES", 96 * 32 * dtype.itemsize - 1)
    monkeypatch.setattr(_streamed, "CHUNK_BYTES", 7 * 32 * dtype.itemsize + 5)
    model: Any = empty_model(folder, dtype=dtype)
    seen = watched(model)
    manager = register_hooks(model, folder, "cpu")
    asked: list[Any] = []
    read_rows = manager._weights.reader.read_rows
    monkeypatch.setattr(
        manager._weights.reader,
        "read_rows",
        lambda name, rows, **options: asked.append((name, rows)) or read_rows(name, rows, **options),
    )
    found = logits_of(model)
    chunks = [rows for name, rows in asked if name == "lm_head.weight"]
    assert chunks == [slice(start, min(start + 7, 96)) for start in range(0, 96, 7)]
    rows = [rows for name, rows in asked if name == "model.embed_tokens.weight"]
    assert [row.tolist() for row in rows] == [[0, 3, 4, 5, 7, 8, 9, 95]]
    assert not any("lm_head.weight" in names for names in seen)
    wanted = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert found.dtype == dtype
    assert torch.allclose(found, logits_of(wanted), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    manager.remove_hooks()
    monkeypatch.undo()


def test_a_streamed_weight_computes_like_the_matrix() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(9, 4)
    weight = StreamedWeight.of(matrix.to("meta"), lambda rows: matrix[rows], torch.device("cpu"))
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.is_meta) == (
        (9, 4),
        torch.float32,
        torch.device("cpu"),
        True,
    )
    assert (weight.size(0), weight.dim(), len(weight), weight.numel()) == (9, 2, 9, 36)
    inputs = torch.randn(3, 2, 4)
    assert torch.allclose(functional.linear(inputs, weight), functional.linear(inputs, matrix))
    assert torch.allclose(inputs @ weight.T, inputs @ matrix.T)
    assert torch.allclose(inputs @ weight.t(), inputs @ matrix.t())
    assert torch.equal(weight + 1, matrix + 1)
    assert torch.equal(torch.cat([weight, weight]), torch.cat([matrix, matrix]))
    assert torch.equal(weight[torch.tensor([1, 1])], matrix[[1, 1]])
    tokens = torch.tensor([[8, 0, 8], [2, 2, 2]])
    assert torch.equal(functional.embedding(tokens, weight, padding_idx=2), matrix[tokens])
    # Scaling long rows down is done to what was read, not to what is stored.
    before = matrix.clone()
    found = functional.embedding(tokens, weight, max_norm=0.5)
    assert float(found.norm(dim=-1).max()) <= 0.5 + 1e-5
    assert torch.equal(matrix, before)
    assert functional.embedding(torch.empty(2, 0, dtype=torch.int64), weight).shape == (2, 0, 4)
    assert functional.linear(torch.empty(0, 4), weight).shape == (0, 9)


def test_gradients_reach_the_inputs_of_a_streamed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_streamed, "CHUNK_BYTES", 40)
    matrix, bias = torch.randn(9, 4), torch.randn(9)
    weight = StreamedWeight.of(matrix.to("meta"), lambda rows: matrix[rows], torch.device("cpu"))
    inputs = torch.randn(3, 4, requires_grad=True)
    functional.linear(inputs, weight, bias).square().sum().backward()
    found, inputs.grad = inputs.grad, None
    functional.linear(inputs, matrix, bias).square().sum().backward()
    assert torch.allclose(found, inputs.grad, atol=1e-5)


def test_autocast_reaches_a_streamed_weight() -> None:
    matrix = torch.randn(9, 4)
    weight = StreamedWeight.of(matrix.to("meta"), lambda rows: matrix[rows], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(torch.randn(2, 4), weight).dtype == torch.bfloat16


def test_a_token_that_is_not_there_is_an_error_that_says_so(
    llama: tuple[Any, HookManager, Tensor],
) -> None:
    model, _, expected = llama
    with pytest.raises(CheckpointError, match="no row 96; its rows are 0 to 95"):
        logits_of(model, torch.tensor([[1, 96]]))
    assert real(model) == set()
    assert torch.equal(logits_of(model), expected)


# --- threads and exceptions -------------------------------------------------------------------------------


def test_threads_share_a_leaf_and_the_last_one_clears_it(llama: tuple[Any, HookManager, Tensor]) -> None:
    model, _, expected = llama
    both_in = threading.Barrier(2, timeout=30)
    one_out = threading.Event()
    loads: list[Any] = []
    inside = model.model.layers[1].mlp.up_proj

    def enter(*_: Any) -> None:
        loads.append(inside.weight)
        both_in.wait()

    inside.register_forward_pre_hook(enter)
    slow = threading.local()

    def leave(*_: Any) -> None:
        if getattr(slow, "waits", False):
            assert one_out.wait(30)
            # The other thread is done with it, and it is still here.
            assert not inside.weight.is_meta

    inside.register_forward_hook(leave, prepend=True)
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda *_: None if getattr(slow, "waits", False) else one_out.set()
    )
    found: dict[bool, Tensor] = {}

    def work(waits: bool) -> None:
        slow.waits = waits
        found[waits] = logits_of(model)

    threads = [threading.Thread(target=work, args=(waits,)) for waits in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(found[True], expected)
    assert torch.equal(found[False], expected)
    assert len(loads) == 2
    assert loads[0] is loads[1]
    assert real(model) == set()


def test_many_threads_get_the_right_outputs(saved: Callable[[str], tuple[Path, Any]]) -> None:
    folder, expected = saved("mixtral")
    model: Any = empty_model(folder)
    manager = register_hooks(model, folder, "cpu")
    inputs = [torch.randint(3, 96, (1, 4 + number)) for number in range(4)]
    wanted = [logits_of(expected, tokens) for tokens in inputs]
    right: list[bool] = []

    def work(number: int) -> None:
        right.extend(torch.equal(logits_of(model, inputs[number]), wanted[number]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 20
    assert real(model) == set()
    manager.remove_hooks()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj", "model.layers.0", "lm_head", ""])
@pytest.mark.parametrize("before", [True, False])
def test_an_exception_leaves_nothing_loaded_and_no_thread_waiting(
    llama: tuple[Any, HookManager, Tensor], kind: type[BaseException], where: str, before: bool
) -> None:
    model, _, expected = llama
    module = model.get_submodule(where)

    def fail(*_: Any) -> None:
        raise kind("stop")

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(fail, prepend=True)
    try:
        with pytest.raises(kind, match="stop"):
            logits_of(model)
    finally:
        handle.remove()
    assert real(model) == set()
    done: list[Tensor] = []
    thread = threading.Thread(target=lambda: done.append(logits_of(model)))
    thread.start()
    thread.join(30)
    assert torch.equal(done[0], expected)
    assert real(model) == set()


def test_a_file_that_goes_bad_leaves_nothing_loaded(
    saved: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved("llama")
    model: Any = empty_model(folder)
    manager = register_hooks(model, folder, "cpu")
    read = manager._weights.reader.read
    left = [9]

    def fail(name: str, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise CheckpointError("file is truncated")
        return read(name, **options)

    monkeypatch.setattr(manager._weights.reader, "read", fail)
    with pytest.raises(CheckpointError, match="truncated"):
        logits_of(model)
    assert real(model) == set()
    left[0] = 1000
    assert torch.equal(logits_of(model), logits_of(expected))
    manager.remove_hooks()


# --- the manager ------------------------------------------------------------------------------------------


def attached(model: nn.Module) -> list[Any]:
    return [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("clean", [True, False])
def test_removing_leaves_the_model_as_it_was(
    saved: Callable[[str], tuple[Path, Any]], clean: bool, family: str
) -> None:
    folder, expected = saved(family)
    model: Any = empty_model(folder)
    before = attached(model)
    parameters = dict(model.named_parameters())
    manager = HookManager(model, folder, "cpu", clean_weights=clean)
    assert manager.handles == []
    assert attached(model) == before
    handles = manager.register_hooks()
    assert handles is manager.handles
    count = len(handles)
    assert len(manager.register_hooks()) == count > 0
    assert attached(model) != before
    logits_of(model)
    manager.remove_hooks()
    manager.remove_hooks()
    assert manager.handles == []
    assert attached(model) == before
    if clean:
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
    else:
        assert torch.equal(logits_of(model), logits_of(expected))
    manager = register_hooks(model, folder, "cpu")
    assert torch.equal(logits_of(model), logits_of(expected))
    manager.remove_hooks()


def test_one_model_has_one_managers_hooks(llama: tuple[Any, HookManager, Tensor]) -> None:
    model, manager, expected = llama
    with pytest.raises(ConfigurationError, match="hooks of another HookManager"):
        register_hooks(model, model.config._name_or_path, "cpu")
    assert torch.equal(logits_of(model), expected)
    assert manager.handles


def test_another_forward_on_the_model_comes_back(saved: Callable[[str], tuple[Path, Any]]) -> None:
    folder, _ = saved("llama")
    model: Any = empty_model(folder)
    calls: list[int] = []
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = counted
    manager = register_hooks(model, folder, "cpu")
    logits_of(model)
    manager.remove_hooks()
    assert model.forward is counted
    assert calls == [1]


def test_the_hooks_are_methods_that_can_be_called(saved: Callable[[str], tuple[Path, Any]]) -> None:
    folder, expected = saved("llama")
    model: Any = empty_model(folder)
    manager = HookManager(model, folder, "cpu")
    manager.register_hooks()
    norm = model.model.norm
    manager.pre_forward_hook(norm, ())
    manager.pre_forward_hook(norm, ())
    assert torch.equal(norm.weight, expected.model.norm.weight)
    manager.post_forward_hook(norm, (), None)
    assert not norm.weight.is_meta
    manager.post_forward_hook(norm, (), None)
    assert norm.weight.is_meta
    manager.post_forward_hook(norm, (), None)
    manager.pre_forward_hook(nn.Linear(1, 1), ())
    assert real(model) == set()
    manager.remove_hooks()


def test_the_allocator_is_tuned_only_where_weights_go(
    saved: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved("llama")
    calls: list[int] = []
    monkeypatch.setattr(_hooks.av_memory, "tune_allocator", lambda: calls.append(1))
    for clean, expected in ((False, 0), (True, 1)):
        register_hooks(empty_model(folder), folder, "cpu", clean_weights=clean).remove_hooks()
        assert len(calls) == expected


def test_what_was_freed_is_given_back_now_and_then(
    saved: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved("llama")
    trims: list[int] = []
    model: Any = empty_model(folder)
    monkeypatch.setattr(_hooks.av_memory, "trim_heap", lambda: trims.append(len(seen)))
    seen = watched(model)
    # Once while the layers pass by, and at the end of each pass.
    layers = [tensor.nbytes for name, tensor in expected.state_dict().items() if ".layers." in name]
    monkeypatch.setattr(_hooks, "_TRIMMED_BYTES", sum(layers))
    for clean, expected_trims in ((True, 2), (False, 0)):
        seen.clear()
        manager = register_hooks(model, folder, "cpu", clean_weights=clean)
        logits_of(model)
        assert len(trims) == expected_trims
        manager.remove_hooks()
        assert not trims or 0 < trims[0] < trims[1]
        trims.clear()


# --- what concerns GPUs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [True, False])
def test_weights_that_are_kept_are_read_once(
    saved: Callable[[str], tuple[Path, Any]], offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved("llama")
    model: Any = empty_model(folder)
    manager = HookManager(model, folder, "cpu")
    manager._weights.keep = offload
    reads: list[str] = []
    for name in ("read", "read_rows"):
        original = getattr(manager._weights.reader, name)

        def count(key: str, *args: Any, original: Any = original, **options: Any) -> Tensor:
            reads.append(key)
            return original(key, *args, **options)

        monkeypatch.setattr(manager._weights.reader, name, count)
    manager._attach(None)
    for _ in range(3):
        assert torch.equal(logits_of(model), logits_of(expected))
        assert real(model) == set()
    assert len(reads) == len(expected.state_dict()) * (1 if offload else 3)
    manager.remove_hooks()


def test_the_configuration_reaches_the_gpu_paths_alone(
    saved: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved("llama")
    limits: list[int | None] = []
    monkeypatch.setattr(HookManager, "_attach", lambda _, limit: limits.append(limit))
    for device, offload in (("cpu", True), ("cuda", True), ("cuda", False)):
        manager = HookManager(empty_model(folder), folder, "cpu")
        manager.device = torch.device(device)
        with config_scope(memory={"use_cpu_offload": offload, "gpu_batch_size": 3}):
            manager.register_hooks()
        assert manager._weights.keep == (device == "cuda" and offload)
        assert limits[-1] == (3 if device == "cuda" else None)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6])
def test_a_large_batch_is_split_and_joined(saved: Callable[[str], tuple[Path, Any]], limit: int) -> None:
    _, expected = saved("llama")
    torch.manual_seed(0)
    tokens = torch.randint(3, 96, (5, 7))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    sizes: list[int] = []

    @functools.wraps(expected.forward)
    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        sizes.append(len(input_ids))
        return expected(input_ids=input_ids, attention_mask=attention_mask, **options)

    with torch.no_grad():
        wanted = expected(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        found = run_in_parts(
            forward,
            (tokens,),
            {"attention_mask": mask, "position_ids": torch.arange(7)[None], "output_hidden_states": True},
            limit,
        )
    assert sizes == [min(limit, 5 - start) for start in range(0, 5, limit)]
    assert type(found) is type(wanted)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-6)
    assert len(found.hidden_states) == 3
    assert torch.allclose(found.hidden_states[1], wanted.hidden_states[1], atol=1e-6)


def test_what_cannot_be_split_or_joined(saved: Callable[[str], tuple[Path, Any]]) -> None:
    _, expected = saved("llama")
    tokens = torch.randint(3, 96, (5, 7))
    with torch.no_grad():
        with pytest.raises(ConfigurationError, match=r"'loss' .* it is a scalar.*memory\.gpu_batch_size"):
            run_in_parts(expected.forward, (), {"input_ids": tokens, "labels": tokens}, 2)
        # A cache that the call brings is whole, and so is the call.
        cached = expected(input_ids=tokens, use_cache=True)
        again = run_in_parts(
            expected.forward, (), {"input_ids": tokens, "past_key_values": cached.past_key_values}, 2
        )
        assert again.past_key_values.get_seq_length() == 14
        split = run_in_parts(expected.forward, (), {"input_ids": tokens}, 2)
        assert split.past_key_values is None
        assert split.logits.shape == (5, 7, 96)
    # Five positions are not five samples.
    places = torch.arange(5)
    found = run_in_parts(
        lambda tokens, cache_position: (tokens, cache_position.sum()[None]),
        (torch.zeros(5, 2),),
        {"cache_position": places},
        2,
    )
    assert found[0].shape == (5, 2)
    assert found[1].tolist() == [10, 10, 10]


@pytest.mark.cuda
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_a_model_computes_on_the_gpu(
    saved: Callable[[str], tuple[Path, Any]], offload: bool, clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hooks, "STREAMED_BYTES", 5000)
    monkeypatch.setattr(_streamed, "CHUNK_BYTES", 3000)
    folder, expected = saved("mixtral")
    model: Any = empty_model(folder)
    reads: list[str] = []
    sizes: list[int] = []
    with config_scope(memory={"use_cpu_offload": offload, "gpu_batch_size": 2}):
        manager = register_hooks(model, folder, "cuda", clean_weights=clean)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for name in ("read", "read_rows"):
        original = getattr(manager._weights.reader, name)

        def count(key: str, *args: Any, original: Any = original, **options: Any) -> Tensor:
            reads.append(key)
            return original(key, *args, **options)

        monkeypatch.setattr(manager._weights.reader, name, count)
    tokens = torch.randint(3, 96, (5, 7))
    wanted = logits_of(expected, tokens)
    for _ in range(2):
        found = logits_of(model, tokens)
        assert found.device.type == "cuda"
        assert torch.allclose(found.cpu(), wanted, atol=1e-2)
    assert sizes == [2, 2, 1] * 2
    assert (len(reads) == len(set(reads))) == (offload or not clean)
    assert (real(model) == set()) == clean
    assert {buffer.device.type for buffer in model.buffers()} == {"cuda"}
    if clean and offload:
        assert all(value.is_pinned() for value in manager._weights._kept.values())
    manager.remove_hooks()
