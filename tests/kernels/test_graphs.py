"""CUDA graphs for several shapes, where there is no GPU: PyTorch's capture is replaced by one that works on a CPU.

As in CUDA, a capture runs nothing, refuses to read a value back, and remembers tensors by their place in memory; a
replay runs the remembered operations there. What Python does within the function happens once. So whatever a step would
take from the batch that was captured, and not from the one that is replayed, shows here.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from training_runs import have_equal_tensors, short_run

import sdtune
from sdtune.adapters import tuner_file
from sdtune.kernels.cuda import graphs
from sdtune.training import trainer


class Capture(TorchDispatchMode):
    """Remembers operations; it must run them to know their results, and undoes what they have changed afterwards."""

    def __init__(self, graph):
        super().__init__()
        self.operations, self.created, self.before = graph.operations, set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        schema = func._schema
        given = {a.name: value for a, value in zip(schema.arguments, args)} | kwargs
        for argument in schema.arguments:
            value = given.get(argument.name)
            if argument.alias_info and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                place = value.untyped_storage().data_ptr()
                if place not in self.created and place not in self.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                    self.before[place] = whole, whole.clone()
        result = func(*args, **kwargs)
        fresh = [x for x, r in zip(tree_flatten(result)[0], schema.returns) if r.alias_info is None]
        self.created |= {x.untyped_storage().data_ptr() for x in fresh if isinstance(x, torch.Tensor)}
        self.operations.append((func, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for whole, values in self.before.values():
            whole.copy_(values)


class CPUGraph:
    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new, returned in zip(tree_flatten(result)[0], tree_flatten(again)[0], func._schema.returns):
                if isinstance(old, torch.Tensor) and returned.alias_info is None:
                    old.copy_(new)


@pytest.fixture
def captures(monkeypatch):
    """The graphs that are captured; CUDA's parts that `graphs` uses are replaced."""
    captured = []

    @contextmanager
    def capture(graph, pool, stream):
        with Capture(graph):
            yield
        captured.append(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    parts = dict(Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: nullcontext(), graph=capture,
                 graph_pool_handle=lambda: None, CUDAGraph=CPUGraph)  # fmt: skip
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    return captured


def test_each_combination_of_shapes_is_captured_once_and_all_give_their_own_results(captures):
    total = torch.zeros(())
    calls = []

    def add(x, y):
        calls.append(1)
        total.add_(x.sum())
        return (x.sum() + y).cumsum(0)

    graphed = graphs.CudaGraphed(add)
    given = [torch.full((size,), float(n)) for n in range(5) for size in (2, 3, 5)]
    results = [graphed(x=x, y=x) for x in given]
    assert len(captures) == 3 and len(calls) == 6  # of each shape one call to warm up, and the capture
    for x, result in zip(given, results):
        assert torch.equal(result, (x.sum() + x).cumsum(0))
    assert total == sum(x.sum() for x in given)


def test_a_function_that_reads_a_value_back_is_called_as_it_is_after_a_warning(captures):
    graphed = graphs.CudaGraphed(lambda x: x * x.sum().item())
    assert graphed(x=torch.ones(3)).tolist() == [3, 3, 3]
    with pytest.warns(UserWarning, match="no CUDA graph could be captured"):
        assert graphed(x=torch.full((3,), 2.0)).tolist() == [12, 12, 12]
    assert not captures


@pytest.mark.parametrize("kind", ["res_attn_layer", "res_attn_conv", "lora"])
def test_a_run_on_several_shapes_learns_what_it_learns_without_graphs(captures, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SDTUNE_KERNELS", "off")  # the kernels for CPUs are no operations of PyTorch
    data = tmp_path / "data"
    data.mkdir()
    for i, size in enumerate([(64, 64), (48, 96), (48, 96), (96, 48), (64, 64)]):
        Image.effect_noise(size, 60).convert("RGB").save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"sks, picture {i}, {{red|blue}}, tag")
    changes = dict(steps=10, trigger_words="sks", shuffle_tags=True, tag_dropout=0.2, caption_dropout=0.0, preserve=0.5)
    plain = sdtune.fit(short_run(data, tmp_path / "plain", **changes), sdtune.TunerConfig(kind=kind))

    prepare = trainer.Trainer.__init__

    def prepare_with_graphs(self, *args):
        prepare(self, *args)
        self.train_on_batch = graphs.CudaGraphed(self._compute_gradients)

    monkeypatch.setattr(trainer.Trainer, "__init__", prepare_with_graphs)
    graphed = sdtune.fit(short_run(data, tmp_path / "graphed", **changes), sdtune.TunerConfig(kind=kind))
    assert len(captures) == 3
    assert graphed.losses == plain.losses
    assert have_equal_tensors(*(tuner_file.load(run.tuner).tensors for run in (plain, graphed)))
