"""clear_memory frees what nobody else can miss, and leaves everything else untouched."""

import asyncio
import gc
import sys
from collections import UserDict, deque

import numpy as np
import pytest
import torch
from av_memory import clear_memory, optimize_memory_usage
from torch.utils.data import DataLoader, TensorDataset

SHAPE = (256, 1024)
BYTES = 256 * 1024 * 4

MODULE_LEVEL = None


def make() -> torch.Tensor:
    return torch.ones(SHAPE)


def assert_freed(tensor: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="freed by clear_memory"):
        tensor.sum()


def assert_whole(tensor: torch.Tensor) -> None:
    assert tensor.shape == SHAPE
    assert tensor.sum().item() == 256 * 1024


def test_a_named_tensor_is_freed_and_raises_afterwards():
    tensor = make()
    release = clear_memory(tensor)
    assert (release.freed_bytes, release.left_bytes, release.left) == (BYTES, 0, ())
    for use in (
        lambda: tensor + 1,
        lambda: 1 + tensor,
        lambda: tensor.shape,
        lambda: tensor[0],
        lambda: len(tensor),
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.numpy(),
        lambda: np.asarray(tensor),
        lambda: torch.nn.functional.linear(tensor, tensor),
        lambda: tensor.data_ptr(),
        lambda: tensor.untyped_storage(),
        lambda: torch.from_dlpack(tensor),
        lambda: bool(tensor),
        lambda: tensor.__reduce_ex__(2),
    ):
        with pytest.raises(RuntimeError, match="freed by clear_memory"):
            use()
    assert "freed" in repr(tensor)
    assert clear_memory(tensor).freed_bytes == 0  # once is enough, twice is harmless


@pytest.mark.parametrize("collect", [True, False])
def test_each_way_of_handing_over(collect: bool):
    first, second, third, fourth = make(), make(), make(), make()
    assert clear_memory([first], collect=collect).freed_bytes == BYTES
    assert clear_memory({"weight": second}, collect=collect).freed_bytes == BYTES
    assert clear_memory((third, [fourth]), collect=collect).freed_bytes == 2 * BYTES
    for tensor in (first, second, third, fourth):
        assert_freed(tensor)


def test_keyword_and_star_calls_are_right_or_cautious():
    tensor = make()
    assert clear_memory(weights=tensor).freed_bytes == BYTES
    other = make()
    release = clear_memory(*[other])
    assert release.freed_bytes + release.left_bytes == BYTES
    if release.left_bytes:
        assert_whole(other)


def test_a_variable_of_the_module_counts_as_the_name():
    global MODULE_LEVEL
    MODULE_LEVEL = make()
    assert clear_memory(MODULE_LEVEL).freed_bytes == BYTES
    assert_freed(MODULE_LEVEL)
    MODULE_LEVEL = None


def test_a_variable_that_an_inner_function_shares_is_left_while_that_function_lives():
    tensor = make()
    seen = [tensor.sum() for _ in range(2)]  # a function of its own before Python 3.12

    def inner() -> torch.Tensor:
        return tensor

    release = clear_memory(tensor)
    assert release.freed_bytes == 0
    assert "inner function" in release.left[0].reason
    assert_whole(inner())
    del inner
    assert clear_memory(tensor).freed_bytes == BYTES
    assert seen[0] == 256 * 1024


def test_inside_generators_and_coroutines():
    def generator():
        tensor = make()
        yield clear_memory(tensor).freed_bytes
        assert_freed(tensor)

    assert list(generator()) == [BYTES]

    async def coroutine() -> int:
        tensor = make()
        await asyncio.sleep(0)
        return clear_memory(tensor).freed_bytes

    assert asyncio.run(coroutine()) == BYTES


def test_a_list_is_emptied_in_place_and_its_unnamed_tensors_go():
    tensors = [make(), make()]
    release = clear_memory(tensors)
    assert tensors == []
    assert release.freed_bytes == 2 * BYTES


@pytest.mark.parametrize(
    "container",
    [lambda: {"a": make()}, lambda: deque([make()]), lambda: {make()}, lambda: UserDict(a=make())],
    ids=["dict", "deque", "set", "UserDict"],
)
def test_other_containers_are_emptied_in_place(container):
    handed_over = container()
    assert clear_memory(handed_over).freed_bytes == BYTES
    assert len(handed_over) == 0


def test_an_attribute_that_holds_the_list_sees_it_emptied():
    class Cache:
        def __init__(self) -> None:
            self.entries = [make()]

    cache = Cache()
    assert clear_memory(cache.entries).freed_bytes == BYTES
    assert cache.entries == []


def test_a_dictionary_with_attributes_such_as_a_model_output():
    from transformers.modeling_outputs import BaseModelOutput

    output = BaseModelOutput(last_hidden_state=make())
    assert clear_memory([output]).freed_bytes == BYTES
    assert len(output) == 0


def test_views_and_what_they_look_at_are_left():
    base = make()
    view = base[:10]
    release = clear_memory(view)
    assert (release.freed_bytes, release.left_bytes) == (0, BYTES)
    assert_whole(base)
    assert view.shape == (10, 1024)
    assert "view" in release.left[0].reason
    assert clear_memory(base).left_bytes == BYTES
    assert_whole(base)


def test_the_guides_loop_over_a_tensor_leaves_the_dataset_whole():
    dataset = make()
    for start in range(0, 256, 64):
        batch = dataset[start : start + 64]
        results = batch * 2
        release = clear_memory([batch, results])
        assert release.freed_bytes == BYTES // 4  # the results, not the dataset
        assert_freed(results)
    assert_whole(dataset)


def test_the_guides_loop_over_a_list_leaves_the_dataset_whole():
    dataset = [make() for _ in range(4)]
    for start in range(0, 4, 2):
        batch = dataset[start : start + 2]
        results = [tensor * 2 for tensor in batch]
        release = clear_memory([batch, results])
        assert (release.freed_bytes, release.left_bytes) == (2 * BYTES, 2 * BYTES)
        assert batch == []
    assert len(dataset) == 4
    for tensor in dataset:
        assert_whole(tensor)


def test_batches_that_are_lists_of_the_dataset_itself_stay_whole():
    dataset = [[make()], [make()]]
    batch = dataset[0:1]
    release = clear_memory([batch])
    assert release.freed_bytes == 0
    assert [len(rows) for rows in dataset] == [1, 1]
    assert_whole(dataset[0][0])


def test_an_element_handed_over_directly_stays_in_its_list_dict_or_object():
    class Holder:
        tensor = make()

    holder = Holder()
    holder.own = make()
    listed, mapped, array = [make()], {"a": make()}, np.empty(1, dtype=object)
    array[0] = make()
    for element in (
        lambda: clear_memory(listed[0]),
        lambda: clear_memory(mapped["a"]),
        lambda: clear_memory(array[0]),
        lambda: clear_memory(holder.own),
        lambda: clear_memory(holder.tensor),
    ):
        release = element()
        assert (release.freed_bytes, release.left_bytes) == (0, BYTES)
    for tensor in (listed[0], mapped["a"], array[0], holder.own, holder.tensor):
        assert_whole(tensor)


def test_a_second_name_keeps_the_tensor():
    tensor = make()
    again = tensor
    release = clear_memory(tensor)
    assert release.freed_bytes == 0
    assert "variables of the caller" in release.left[0].reason
    assert_whole(again)


def test_a_name_in_the_callers_caller_keeps_the_tensor_unless_stacklevel_says_otherwise():
    def clean(argument: torch.Tensor, stacklevel: int):
        return clear_memory(argument, stacklevel=stacklevel)

    tensor = make()
    assert clean(tensor, 1).freed_bytes == 0
    assert_whole(tensor)
    assert clean(tensor, 2).freed_bytes == BYTES
    assert_freed(tensor)


def test_a_closure_of_another_function_keeps_the_tensor():
    def keeper():
        kept = make()
        return lambda: kept

    get = keeper()
    assert clear_memory(get()).freed_bytes == 0
    assert_whole(get())


def test_numpy_neighbours_are_left():
    tensor = make()
    array = tensor.numpy()
    assert clear_memory(tensor).left_bytes == BYTES
    assert_whole(tensor)
    assert array.sum() == 256 * 1024

    source = np.ones(SHAPE, dtype=np.float32)
    borrowed = torch.from_numpy(source)
    release = clear_memory(borrowed)
    assert (release.freed_bytes, release.left_bytes) == (0, BYTES)
    assert_whole(borrowed)
    assert "another library" in release.left[0].reason


def test_dlpack_neighbours_are_left():
    for consume in (torch.from_dlpack, np.from_dlpack):
        tensor = make()
        neighbour = consume(tensor)
        assert clear_memory(tensor).left_bytes == BYTES
        assert_whole(tensor)
        assert neighbour.shape == SHAPE
    tensor = make()
    capsule = tensor.__dlpack__()
    assert clear_memory(tensor).left_bytes == BYTES
    assert_whole(tensor)
    del capsule


def test_tensors_saved_for_backward_are_left_and_the_gradient_is_right():
    weight = torch.full((4, 4), 3.0, requires_grad=True)
    data = torch.full((4, 4), 2.0)
    product = data @ weight
    activation = product.exp()  # saves its own result
    for tensor in (data, weight, activation):
        assert clear_memory(tensor).freed_bytes == 0
    activation.log().sum().backward()
    # d/dW of sum(log(exp(X W))) is X^T 1, which is 4 * 2 everywhere.
    assert torch.allclose(weight.grad, torch.full((4, 4), 8.0))


def test_a_result_with_a_graph_gives_up_storage_and_graph():
    weight = torch.ones(SHAPE, requires_grad=True)
    kept = make()
    result = (weight * kept) + 1  # saves weight and kept, not itself
    before = sys.getrefcount(kept)
    assert clear_memory(result).freed_bytes == BYTES
    assert_freed(result)
    assert sys.getrefcount(kept) <= before
    assert clear_memory(kept).freed_bytes == BYTES  # the graph that saved it is gone


def test_gradients_go_with_their_leaf():
    leaf = make().requires_grad_()
    (leaf * 2).sum().backward()
    assert clear_memory(leaf).freed_bytes == 2 * BYTES


def test_parameters_of_a_live_module_are_left():
    module = torch.nn.Linear(1024, 256, bias=False)
    weight = module.weight
    release = clear_memory(weight)
    assert release.freed_bytes == 0
    assert clear_memory(list(module.parameters())).freed_bytes == 0
    assert module(torch.ones(1, 1024)).shape == (1, 256)
    assert weight is module.weight


def test_a_module_handed_over_gives_up_its_parameters_and_buffers():
    module = torch.nn.Sequential(torch.nn.Linear(1024, 256, bias=False), torch.nn.BatchNorm1d(256))
    expected = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    release = clear_memory(module)
    assert (release.freed_bytes, release.left_bytes) == (expected, 0)
    with pytest.raises(RuntimeError, match="freed by clear_memory"):
        module(torch.ones(2, 1024))


def test_tied_parameters_are_counted_once_and_freed():
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(*SHAPE)
            self.head = torch.nn.Linear(1024, 256, bias=False)
            self.head.weight = self.embed.weight

    tied = Tied()
    assert clear_memory([tied]).freed_bytes == BYTES


def test_a_submodule_or_a_module_in_an_optimiser_keeps_its_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert clear_memory(model[0]).freed_bytes == 0
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    assert clear_memory(model).freed_bytes == 0
    model(torch.ones(1, 8)).sum().backward()
    optimiser.step()


def test_meta_sparse_and_subclass_tensors_are_left_alone():
    class Wrapped(torch.Tensor):
        pass

    meta = torch.empty(SHAPE, device="meta")
    sparse = make().to_sparse()
    wrapped = make().as_subclass(Wrapped)
    assert clear_memory(meta).freed_bytes == 0
    assert clear_memory(sparse).freed_bytes == 0
    assert clear_memory(wrapped).freed_bytes == 0
    assert (meta.shape, sparse.shape, wrapped.shape) == (SHAPE, SHAPE, SHAPE)


def test_a_container_within_itself_and_a_cycle_end():
    loop: list = [make()]
    loop.append(loop)
    assert clear_memory(loop).freed_bytes == BYTES
    first: dict = {"tensor": make()}
    second = [first]
    first["back"] = second
    assert clear_memory([first]).freed_bytes == BYTES


def test_garbage_in_cycles_is_collected_only_when_asked():
    class Node:
        pass

    def leak() -> None:
        node = Node()
        node.self = node

    gc.collect()
    leak()
    assert clear_memory(collect=False).collected_objects is None
    assert clear_memory().collected_objects >= 1


def test_other_kinds_are_left_with_a_reason():
    array = np.ones(10)
    release = clear_memory(array)
    assert release.left_bytes == array.nbytes
    assert "delete its name" in release.left[0].reason
    assert "delete its name" in str(release)
    assert clear_memory([array, 3, None]).freed_bytes == 0
    with pytest.raises(ValueError, match="stacklevel"):
        clear_memory(stacklevel=0)


def test_locals_seen_earlier_by_the_caller_stay_what_they_are():
    tensor, number = make(), 7
    seen = locals()
    clear_memory(tensor)
    assert seen["number"] == number == 7


def test_nothing_of_the_caller_is_kept_alive():
    class Witness:
        pass

    import weakref

    witness = Witness()
    alive = weakref.ref(witness)
    tensor = make()
    clear_memory(tensor)
    del witness
    assert alive() is None


def test_a_dataloader_with_live_workers():
    dataset = TensorDataset(torch.arange(8.0))
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    next(iter(loader))
    workers = list(loader._iterator._workers)
    release = clear_memory(dataloader=loader)
    assert release.workers_stopped == 1
    assert not any(worker.is_alive() for worker in workers)
    assert len(dataset) == 8
    assert len(list(loader)) == 4  # it starts new ones when it is used again
    clear_memory(dataloader=loader)
    assert clear_memory(dataloader=DataLoader(dataset)).workers_stopped == 0
    with pytest.raises(TypeError, match="DataLoader"):
        clear_memory(dataloader=[1, 2])


def test_optimize_memory_usage_says_what_it_did():
    done = optimize_memory_usage()
    assert done.allocator.reason
    assert done.release.rss_after_mb > 0


def test_500_mb_that_the_caller_still_names_leave_the_resident_set(run_fresh):
    out = run_fresh(
        """
        import torch
        from av_memory import clear_memory, get_cpu_memory
        clear_memory()
        tensor = torch.ones(500 * 2**18)  # 500 MB of float32
        before = get_cpu_memory()
        release = clear_memory(tensor)
        print(before - get_cpu_memory(), release.freed_bytes)
        """
    )
    dropped_mb, freed = out.split()
    assert float(dropped_mb) >= 0.95 * 500
    assert int(freed) == 500 * 2**20


def test_without_torch_nothing_imports_it(run_fresh):
    run_fresh(
        """
        import sys
        import av_memory
        values = [bytearray(10**6)]
        av_memory.clear_memory(values, force_cuda_empty_cache=True)
        assert values == []
        av_memory.get_memory_stats(), av_memory.get_gpu_memory(), av_memory.reset_peak_memory()
        av_memory.find_batch_size(lambda size: None, 8)
        with av_memory.MemoryTracker("x"):
            pass
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        """
    )
