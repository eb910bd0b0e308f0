"""Holders that are hard to see keep a tensor: what clear_memory would break if it counted carelessly."""

import copy
import functools
import sys
import weakref
from collections import UserDict, namedtuple
from unittest import mock

import pytest
import torch
from av_memory import clear_memory
from torch.utils.data import DataLoader, TensorDataset

SHAPE = (64, 64)
BYTES = 64 * 64 * 4


def make() -> torch.Tensor:
    return torch.ones(SHAPE)


def linear() -> torch.nn.Linear:
    layer = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.ones_(layer.weight)
    return layer


def assert_whole(tensor: torch.Tensor) -> None:
    assert tensor.sum().item() == 64 * 64


class Bunch(dict):
    """The common dictionary whose attributes are its entries."""

    def __init__(self, **entries: object) -> None:
        super().__init__(**entries)
        self.__dict__ = self


class Repeating(list):
    def __iter__(self):
        yield from list.__iter__(self)
        yield from list.__iter__(self)


def test_containers_that_show_an_entry_twice():
    held = [make(), make()]
    clear_memory(Bunch(weight=held[0]))
    clear_memory(Repeating([held[1]]))
    for tensor in held:
        assert_whole(tensor)


def test_a_tuple_that_somebody_else_keeps():
    @functools.lru_cache
    def load() -> tuple[torch.Tensor, ...]:
        return make(), make()

    pair = namedtuple("Pair", "first second")

    class Holder:
        weights = pair(make(), make())

    dataset = TensorDataset(make())
    iterator = iter((make(),))
    clear_memory(load())
    clear_memory(Holder.weights)
    clear_memory(dataset.tensors)
    for tensor in (*load(), *Holder.weights, *dataset.tensors, *iterator):
        assert_whole(tensor)


@pytest.mark.parametrize(
    "hold",
    [
        copy.copy,
        lambda module: module._parameters,
        lambda module: module._parameters.values(),
        vars,
        weakref.proxy,
    ],
    ids=["shallow copy", "parameters", "view of parameters", "attributes", "proxy"],
)
def test_a_module_whose_inside_is_held(hold):
    module = linear()
    weight_of = functools.partial(getattr, module, "weight")
    held = hold(module)
    clear_memory(held if isinstance(held, weakref.ProxyType) else module)
    assert_whole(weight_of())


def test_a_mapping_whose_inside_is_held():
    mapping = UserDict(a=make())
    data = mapping.data
    handed_over = [mapping]
    del mapping
    clear_memory(handed_over)
    assert_whole(data["a"])


def test_weak_references_and_storages():
    cache = weakref.WeakValueDictionary()
    cached = cache["a"] = make()
    clear_memory(cached)
    assert_whole(cache["a"])
    tensor = make()
    storage = tensor.untyped_storage()
    assert clear_memory(tensor).freed_bytes == 0
    assert storage.nbytes() == BYTES
    lazy = make()
    neighbour = torch._lazy_clone(lazy)
    assert clear_memory(lazy).freed_bytes == 0
    assert_whole(neighbour)
    shared = make().share_memory_()
    assert clear_memory(shared).freed_bytes == 0


def test_a_global_seen_by_two_frames_counts_once():
    namespace = {"make": make, "clear_memory": clear_memory}
    exec(
        "weight = make(); holder = [weight]\ndef clean(): clear_memory(weight, stacklevel=2)\nclean()",
        namespace,
    )
    assert_whole(namespace["holder"][0])


def test_two_names_in_the_callers_caller():
    def clean(items: list) -> None:
        clear_memory(items.pop(), stacklevel=2)

    first = second = make()
    clean([first])
    assert_whole(second)


def test_names_made_by_exec_are_no_variables_and_stay():
    holder = [make()]
    exec("alias = holder[0]")
    clear_memory(holder[0])
    assert_whole(holder[0])
    exec("number = 5")
    clear_memory(make())
    if sys.version_info < (3, 13):  # later ones forget it by themselves
        exec("assert number == 5")


def test_a_hook_that_uses_the_variable():
    factor = make()
    leaf = make().requires_grad_()
    leaf.register_hook(lambda gradient: gradient * factor)
    product = (leaf * 2).sum()
    clear_memory(factor)
    product.backward()
    assert_whole(leaf.grad / 2)


def test_a_gradient_that_was_retained_is_counted():
    leaf = make().requires_grad_()
    middle = leaf + 1
    middle.retain_grad()
    middle.sum().backward()
    assert clear_memory(middle).freed_bytes == 2 * BYTES


@pytest.mark.parametrize(
    "make_odd",
    [
        lambda: torch._to_functional_tensor(make()),
        lambda: torch.nn.LazyLinear(3),
        lambda: mock.MagicMock(spec=torch.nn.Module),
        lambda: make().to_sparse_csr(),
        lambda: torch.nested.nested_tensor([make(), make()]),
        lambda: torch.quantize_per_tensor(make(), 0.1, 0, torch.qint8),
    ],
    ids=["functional", "lazy", "mock", "sparse", "nested", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_and_modules_neither_crash_nor_raise(make_odd):
    handed_over = [make_odd(), make()]
    clear_memory(handed_over)
    assert handed_over == []


def test_within_a_transformed_function():
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        seen.append(clear_memory(doubled).left[0].reason)
        return x.sum()

    torch.func.grad(function)(make())
    torch.func.vmap(function)(make())
    assert len(seen) == 2
    assert all("transforms" in reason for reason in seen)


def test_a_loop_over_the_loader_goes_on():
    loader = DataLoader(
        TensorDataset(torch.arange(6.0)), batch_size=1, num_workers=1, persistent_workers=True
    )
    seen = 0
    for batch in loader:
        clear_memory(batch, loader, collect=False)
        seen += 1
    assert seen == 6
    del batch
    assert clear_memory(dataloader=loader).workers_stopped == 1
