"""auto_round.config_manager: values, changes, files, the configuration in force and its scopes."""

import asyncio
import contextvars
import copy
import inspect
import json
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from auto_round import config_manager
from auto_round.config_manager import (
    AutoRoundConfig,
    ExportConfig,
    LayerSettings,
    MemoryConfig,
    QuantizationConfig,
    config_scope,
    configure,
    get_config,
    load_config,
)
from auto_round.exceptions import AutoRoundError, ConfigurationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def scope():
    """No test changes the process's configuration, except in a process of its own."""
    with config_scope(AutoRoundConfig()) as config:
        yield config


def test_the_contract():
    for name in ("AutoRoundConfig", "get_config", "configure", "load_config"):
        assert name in config_manager.__all__
        assert inspect.getdoc(getattr(config_manager, name))
    config = AutoRoundConfig(
        model_path="Qwen/Qwen-14B",
        device="cuda",
        quantization={"bits": 4, "group_size": 128, "symmetric": True},
    )
    assert (config.model_path, config.device) == ("Qwen/Qwen-14B", "cuda")
    quantization, memory, export = config.quantization, config.memory, config.export
    assert (quantization.bits, quantization.group_size, quantization.symmetric) == (4, 128, True)
    assert (quantization.weight_dtype, quantization.act_bits) == ("int", 16)
    assert (memory.workspace_dir, memory.clean_weights_after_use) == (None, True)
    assert (memory.use_cpu_offload, memory.gpu_batch_size) == (True, 8)
    assert (export.export_format, export.export_path, export.mixed_precision) == ("auto_round", None, True)
    assert list(config.to_dict()) == ["model_path", "device", "memory", "quantization", "export"]


def test_areas_are_given_as_objects_or_mappings():
    area = QuantizationConfig(bits=2, group_size=32)
    config = AutoRoundConfig(quantization=area, memory={"gpu_batch_size": 2})
    assert config.quantization == area
    area.bits = 3
    assert config.quantization.bits == 2  # what was given was copied
    config.quantization = {"iters": 0}
    assert config.quantization == QuantizationConfig(iters=0)  # assignment replaces the area
    config.export = ExportConfig(export_path=Path("out"))
    assert config.export.export_path == "out"


WRONG = [
    ({"quantization": {"bits": 9}}, "quantization.bits is 9; it must be an integer from 2 to 8"),
    ({"quantization": {"bits": 1}}, "from 2 to 8"),
    ({"quantization": {"bits": 4.0}}, "from 2 to 8"),
    ({"quantization": {"bits": True}}, "from 2 to 8"),
    ({"quantization": {"bits": "4"}}, "from 2 to 8"),
    ({"quantization": {"bits": 10**5000}}, "of too many digits"),
    ({"quantization": {"group_size": 0}}, "a multiple of 8, such as 32, 64 or 128, or -1"),
    ({"quantization": {"group_size": -2}}, "a multiple of 8"),
    ({"quantization": {"group_size": 100}}, "a multiple of 8"),
    ({"quantization": {"group_size": 2**40}}, "a multiple of 8"),
    ({"quantization": {"group_size": 32.0}}, "a multiple of 8"),
    ({"quantization": {"symmetric": 1}}, "symmetric is 1; it must be True or False"),
    ({"quantization": {"weight_dtype": "mxfp"}}, r"did you mean 'mxfp4'\?"),
    ({"quantization": {"weight_dtype": []}}, "one of 'int', 'mxfp4', 'nvfp4', 'fp8'"),
    ({"quantization": {"act_bits": 4}}, "act_bits is 4; it must be one of 8, 16"),
    ({"quantization": {"act_bits": 8.0}}, "one of 8, 16"),
    ({"quantization": {"scale_dtype": "fp16"}}, "one of 'float16', 'bfloat16', 'float32'"),
    ({"quantization": {"iters": -1}}, "iters is -1; it must be an integer from 0"),
    ({"quantization": {"seed": 2**32}}, "from 0 to 4294967295"),
    ({"quantization": {"lr": 0}}, "lr is 0; it must be a number above 0 or None"),
    ({"quantization": {"lr": float("nan")}}, "above 0"),
    ({"quantization": {"minmax_lr": float("inf")}}, "above 0"),
    ({"quantization": {"lr": 10**400}}, "above 0"),
    ({"quantization": {"quality": "best", "iters": 0}}, "set iters to at least 1, or quality to 'rtn'"),
    ({"quantization": {"calibration": "own"}}, "one of 'user', 'self', 'mixed'"),
    ({"quantization": {"weight_dtype": "mxfp4", "group_size": 64}}, "group_size=64; it has group_size=32"),
    ({"quantization": {"weight_dtype": "nvfp4", "bits": 8}}, "bits=8; it has bits=4"),
    ({"quantization": {"weight_dtype": "fp8", "symmetric": False}}, "symmetric=False; it has symmetric=True"),
    ({"quantization": {"ignore_layers": "lm_head"}}, r'a list of layers, such as \["lm_head"\]'),
    ({"quantization": {"ignore_layers": [""]}}, "text that is not empty"),
    ({"quantization": {"ignore_layers": ["(", "x"]}}, "no regular expression: missing"),
    ({"quantization": {"layer_config": ["down_proj"]}}, "a mapping such as"),
    ({"quantization": {"layer_config": {"q[": {}}}}, "no regular expression"),
    ({"quantization": {"layer_config": {3: {}}}}, "names a layer 3"),
    ({"quantization": {"layer_config": {"q": 8}}}, r"layer_config\['q'\] takes a mapping of its fields"),
    ({"quantization": {"layer_config": {"q": {"bit": 8}}}}, r"has no field 'bit' \(did you mean 'bits'\?\)"),
    ({"quantization": {"layer_config": {"q": {"bits": 9}}}}, r"layer_config\['q'\]: .*bits is 9"),
    ({"quantization": {"layer_config": {"q": {"weight_dtype": "fp8", "bits": 4}}}}, "it has bits=8"),
    ({"quantization": {"layer_config": {"lm_head": {"bits": 8}}}}, "take it out of one of the two"),
    ({"memory": {"gpu_batch_size": 0}}, "memory.gpu_batch_size is 0; it must be an integer from 1"),
    ({"memory": {"max_ram_mb": 0}}, "from 1 to 2147483647 or None"),
    ({"memory": {"max_ram_mb": "4GB"}}, "from 1"),
    ({"memory": {"workspace_dir": ""}}, "a path that is not empty"),
    ({"memory": {"workspace_dir": "a\0b"}}, "no zero byte"),
    ({"memory": {"workspace_dir": 3}}, "workspace_dir is 3; it must be a path"),
    ({"memory": {"use_cpu_offload": None}}, "True or False"),
    ({"export": {"export_format": "gtpq"}}, r"did you mean 'gptq'\?"),
    ({"export": {"export_format": []}}, "at least one"),
    ({"export": {"export_format": ["gguf", "gguf"]}}, "each of them once"),
    ({"export": {"export_format": None}}, "must be one of auto_round, gptq"),
    ({"export": {"mixed_precision": "yes"}}, "True or False"),
    ({"export": {"max_shard_size": "5 bananas"}}, "such as '500MB' or '2GiB'"),
    ({"export": {"max_shard_size": "0MB"}}, "above 0"),
    ({"export": {"max_shard_size": -5}}, "max_shard_size is -5"),
    ({"device": "cud"}, "device is 'cud'; it must be auto, cpu, cuda or cuda:N"),
    ({"device": "cuda:"}, "it must be auto"),
    ({"device": None}, "it must be auto"),
    ({"model_path": b"model"}, "model_path is b'model'; it must be a path"),
    ({"model_path": ""}, "not empty"),
    ({"memory": 3}, "The area 'memory' takes a mapping of its fields, but got a int: 3"),
    ({"memory": QuantizationConfig()}, "The area 'memory' takes a mapping .*, but got a QuantizationConfig"),
    ({"memory": {"gpu_batchsize": 1}}, r"no field 'gpu_batchsize' \(did you mean 'gpu_batch_size'\?\)"),
    (
        {"memory": {"zzz": 1}},
        "it has workspace_dir, clean_weights_after_use, use_cpu_offload, gpu_batch_size",
    ),
    ({"memory": {3: 1}}, "no field 3; it has"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_refused_wherever_it_is_given(values, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        AutoRoundConfig(**values)
    with pytest.raises(ConfigurationError, match=message):
        AutoRoundConfig.from_dict(values)
    config = AutoRoundConfig("model", "cpu", quantization={"seed": 7})
    before = config.to_dict()
    with pytest.raises(ConfigurationError, match=message):
        config.update(**{"model_path": "other", **values})
    assert config.to_dict() == before
    with pytest.raises(ConfigurationError, match=message):
        configure(**values)


@pytest.mark.parametrize("key", ["quantisation", "Memory", "", "x" * 10**6])
def test_unknown_keys_name_the_nearest(key):
    with pytest.raises(ConfigurationError, match="The configuration has no field") as caught:
        AutoRoundConfig().update(**{key: {}})
    assert len(str(caught.value)) < 400
    if key == "quantisation":
        assert "did you mean 'quantization'" in str(caught.value)
    with pytest.raises(ConfigurationError, match="has no field"):
        setattr(AutoRoundConfig(), key, {})


def test_a_field_given_outside_its_area():
    with pytest.raises(ConfigurationError, match=r"give it as quantization=\{'bits': \.\.\.\}"):
        configure(bits=2)


def test_errors_are_both_kinds():
    assert issubclass(ConfigurationError, AutoRoundError)
    with pytest.raises(ValueError, match="takes a mapping"):
        AutoRoundConfig.from_dict([1])


def test_assignment_is_checked_at_once():
    config = AutoRoundConfig()
    with pytest.raises(ConfigurationError, match="from 2 to 8"):
        config.quantization.bits = 9
    with pytest.raises(ConfigurationError, match=r"no field 'bit' \(did you mean 'bits'\?\)"):
        config.quantization.bit = 3
    with pytest.raises(ConfigurationError, match="one update together with weight_dtype"):
        AutoRoundConfig(quantization={"weight_dtype": "mxfp4"}).quantization.group_size = 64
    assert config == AutoRoundConfig()
    area = config.quantization
    area.bits = 2
    area.group_size = 64
    assert (config.quantization.bits, config.quantization.group_size, area.group_size) == (2, 64, 64)
    with pytest.raises(TypeError):
        config.quantization.layer_config["q_proj"] = {"bits": 99}
    with pytest.raises(TypeError):
        AutoRoundConfig(quantization={"layer_config": {"q": {}}}).quantization.layer_config["q"]["bits"] = 99


def test_an_area_keeps_what_was_set_when_it_was_read():
    config = AutoRoundConfig()
    area = config.quantization
    config.update(quantization={"bits": 2, "group_size": 32})
    assert (area.bits, area.group_size) == (4, 128)
    area.seed = 1  # changes that field alone, and reads the rest anew
    assert (config.quantization.bits, area.bits, config.quantization.seed) == (2, 2, 1)


def test_update_merges_areas_and_replaces_values():
    config = AutoRoundConfig(memory={"gpu_batch_size": 2}, quantization={"layer_config": {"q": {"bits": 8}}})
    assert config.update(memory={"max_ram_mb": 900}, device="cpu") is config
    assert (config.memory.gpu_batch_size, config.memory.max_ram_mb, config.device) == (2, 900, "cpu")
    config.update(memory=MemoryConfig(max_ram_mb=5))
    assert config.memory == MemoryConfig(max_ram_mb=5)
    config.update(quantization={"layer_config": {"k": {"bits": 2}}, "ignore_layers": []})
    assert config.quantization.to_dict()["layer_config"] == {"k": {"bits": 2}}
    assert config.quantization.ignore_layers == ()


USUAL = {
    "int": (4, 128, True),
    "mxfp4": (4, 32, True),
    "nvfp4": (4, 16, True),
    "fp8": (8, -1, True),
}


@pytest.mark.parametrize("new", USUAL)
@pytest.mark.parametrize("old", USUAL)
def test_every_kind_of_weight_can_become_every_other(old, new):
    by_name = QuantizationConfig(weight_dtype=old)
    assert (by_name.bits, by_name.group_size, by_name.symmetric) == USUAL[old]
    config = AutoRoundConfig(quantization={"weight_dtype": old})
    config.quantization.weight_dtype = new
    area = config.quantization
    assert (area.bits, area.group_size, area.symmetric) == USUAL[new]
    config = AutoRoundConfig(quantization={"weight_dtype": old})
    config.update(quantization=QuantizationConfig(weight_dtype=new).to_dict())
    assert config.quantization == QuantizationConfig(weight_dtype=new)


def test_the_same_kind_leaves_the_rest_alone():
    config = AutoRoundConfig(quantization={"bits": 2, "group_size": 64, "symmetric": False})
    config.update(quantization={"weight_dtype": "int"})
    assert (config.quantization.bits, config.quantization.group_size) == (2, 64)
    config.update(quantization={"bits": None})
    assert config.quantization.bits == 4


def test_layers_by_name_and_expression():
    area = QuantizationConfig(
        bits=2,
        group_size=32,
        layer_config={
            "model.layers.0.mlp.down_proj": {"bits": 8},
            "down_proj": {"bits": 3},
            r"layers\.[01]\..*_proj": {"group_size": 64},
            "^gate": {"bits": 7},
            "up_proj": {"weight_dtype": "mxfp4"},
        },
        ignore_layers=["lm_head", "router", "h+1.out"],
    )
    usual = LayerSettings(bits=2, group_size=32, symmetric=True, weight_dtype="int")
    expected = {
        "model.layers.0.mlp.down_proj": LayerSettings(
            bits=8, group_size=32, symmetric=True, weight_dtype="int"
        ),
        "model.layers.1.mlp.down_proj": LayerSettings(
            bits=2, group_size=64, symmetric=True, weight_dtype="int"
        ),
        "model.layers.11.mlp.down_proj": LayerSettings(
            bits=3, group_size=32, symmetric=True, weight_dtype="int"
        ),
        "model.layers.1.mlp.up_proj": LayerSettings(
            bits=4, group_size=32, symmetric=True, weight_dtype="mxfp4"
        ),
        "model.layers.11.mlp.gate_proj": usual,  # ^ means the beginning of the whole name
        "my_down_proj": usual,
        "lm_head": None,
        "model.lm_head": None,
        "lm_head.0": usual,
        "layers.3.router": None,
        "h+1.out": None,  # the name itself, whatever the expression means
    }
    assert {name: area.for_layer(name) for name in expected} == expected


def test_sizes_of_shards():
    sizes = {"5GB": 5 * 10**9, "500 MB": 5 * 10**8, "2GiB": 2**31, "7kb": 7000, "12B": 12, 99: 99}
    assert {size: ExportConfig(max_shard_size=size).max_shard_bytes for size in sizes} == sizes
    assert ExportConfig(export_format=["gguf", "fake"]).formats == ("gguf", "fake")
    assert ExportConfig(export_format="gguf").formats == ("gguf",)


# Files


def test_where_save_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = AutoRoundConfig("model")
    with pytest.raises(ConfigurationError, match=r"save\('config.json'\), or set export_path"):
        config.save()
    config.export.export_path = tmp_path / "out"
    assert config.save() == tmp_path / "out" / "auto_round_config.json"
    assert config.save("named.json") == tmp_path / "named.json"
    monkeypatch.chdir("out")
    config.device = "cpu"
    assert config.save() == tmp_path / "named.json"  # the last one, wherever the process is now
    loaded = AutoRoundConfig.load(tmp_path / "named.json")
    assert loaded == config
    assert loaded.save() == tmp_path / "named.json"
    with pytest.raises(ConfigurationError, match="is a folder; name a file in it"):
        config.save(tmp_path)
    for path in ("", "a\0b"):
        with pytest.raises(ConfigurationError, match="a path that is not empty and has no zero byte"):
            config.save(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    config = AutoRoundConfig("first")
    config.save(path)
    config.model_path = "second"

    def fail(*arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="full"):
            config.save()
    assert AutoRoundConfig.load(path).model_path == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"quantization": {"bits": 3}, "model_path": "m"}')
    assert AutoRoundConfig.load(str(path)) == AutoRoundConfig("m", quantization={"bits": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"device": "cpu"', "is not valid JSON"),
        (b"\xff\xfe\xfd", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"quantization": {"bits": ' + b"9" * 5000 + b"}}", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, but holds a list"),
        (b'{"quantization": {"bits": 4, "bits": 2}}', "'bits' comes twice"),
        (b" " * (17 << 20), "is longer than"),
        (b'{"format_version": 2}', "has format version 2; this release .* reads 1.*upgrade"),
        (b'{"format_version": "1"}', "format version '1'"),
        (b'{"format_version": true}', "format version True"),
        (b'{"quantization": {"bits": NaN}}', "quantization.bits is nan"),
        (b'{"quantisation": {}}', "did you mean 'quantization'"),
        (b'{"quantization": null}', "takes a mapping"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_that_is_wrong_is_named(content, message, tmp_path):
    path = tmp_path / "hostile.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        AutoRoundConfig.load(path)
    assert str(path) in str(caught.value)
    before = get_config().to_dict()
    with pytest.raises(ConfigurationError):
        load_config(path)
    assert get_config().to_dict() == before


@pytest.mark.parametrize("path", ["missing.json", ".", "a\0b"])
def test_a_file_that_cannot_be_read(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"does not exist|cannot be read"):
        AutoRoundConfig.load(path)


# Any valid configuration

PATHS = st.none() | st.text(st.characters(exclude_characters="\0"), min_size=1)
RATES = st.none() | st.floats(min_value=1e-9, max_value=10)
COUNTS = st.integers(1, 2**31 - 1)
KINDS = st.one_of(
    st.builds(
        dict,
        bits=st.integers(2, 8),
        group_size=st.sampled_from([-1, 8, 32, 128, 1024]),
        symmetric=st.booleans(),
        weight_dtype=st.just("int"),
    ),
    st.sampled_from([{"weight_dtype": "mxfp4"}, {"weight_dtype": "nvfp4", "group_size": 16}]),
    st.builds(dict, weight_dtype=st.just("fp8"), group_size=st.sampled_from([-1, 128])),
)
LAYERS = st.dictionaries(st.sampled_from(["q_proj", r".*\.0\..*", "model.x"]), KINDS)
QUANTIZATION = st.builds(
    lambda kind, rest: {**kind, **rest},
    KINDS,
    st.fixed_dictionaries(
        {},
        optional={
            "act_bits": st.sampled_from([8, 16]),
            "act_dynamic": st.booleans(),
            "scale_dtype": st.sampled_from(["float16", "bfloat16", "float32"]),
            "quality": st.sampled_from(["rtn", "optimized_rtn", "signround"]),
            "calibration": st.sampled_from(["user", "self", "mixed"]),
            "iters": st.integers(0, 10**6),
            "lr": RATES,
            "minmax_lr": RATES,
            "nsamples": COUNTS,
            "layer_config": LAYERS,
            "ignore_layers": st.lists(st.sampled_from(["lm_head", "^embed", "a|b"])),
            "seed": st.integers(0, 2**32 - 1),
        },
    ),
)
CONFIGS = st.builds(
    AutoRoundConfig,
    model_path=PATHS,
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    memory=st.fixed_dictionaries(
        {}, optional={"workspace_dir": PATHS, "use_cpu_offload": st.booleans(), "max_ram_mb": COUNTS}
    ),
    quantization=QUANTIZATION,
    export=st.fixed_dictionaries(
        {},
        optional={
            "export_format": st.sampled_from(["gptq", ["gguf"], ("onnx", "fake")]),
            "export_path": PATHS,
            "max_shard_size": st.sampled_from(["1GB", 12345]),
        },
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(config=CONFIGS, other=CONFIGS)
def test_any_configuration_survives(config, other, tmp_path):
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert AutoRoundConfig.from_dict(values) == config
    assert AutoRoundConfig(**values) == config
    config.save(tmp_path / "config.json")
    assert AutoRoundConfig.load(tmp_path / "config.json") == config
    assert config.copy().update(**values) == config
    assert other.update(**values) == config  # from any valid one to any other, in one update
    for duplicate in (config.copy(), copy.copy(config), copy.deepcopy(config)):
        assert duplicate == config
        duplicate.quantization.seed = (config.quantization.seed + 1) % 100
        assert duplicate != config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - pickled here
    assert pickle.loads(pickle.dumps(config.quantization)) == config.quantization  # noqa: S301 - the same
    assert repr(config.quantization) in repr(config)


# The configuration in force


def test_one_instance(tmp_path):
    code = f"""
import threading
from auto_round.config_manager import AutoRoundConfig, configure, get_config, load_config
config = get_config()
assert configure(quantization={{"bits": 3}}, device="cpu") is config
assert config.quantization.bits == 3 and get_config() is config
seen = []
thread = threading.Thread(target=lambda: seen.append(get_config()))
thread.start(); thread.join()
assert seen[0] is config
AutoRoundConfig("other").save({str(tmp_path / "c.json")!r})
assert load_config({str(tmp_path / "c.json")!r}) is config
assert config.model_path == "other" and config.quantization.bits == 4 and config.device == "auto"
config.model_path = "third"
assert str(config.save()) == {str(tmp_path / "c.json")!r}
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert AutoRoundConfig.load(tmp_path / "c.json").model_path == "third"


def test_scopes_nest_and_end(tmp_path):
    outer = get_config()
    configure(quantization={"bits": 3})
    AutoRoundConfig("from file").save(tmp_path / "c.json")
    with config_scope(quantization={"group_size": 32}) as inner:
        assert get_config() is inner is not outer
        assert (inner.quantization.bits, inner.quantization.group_size) == (3, 32)
        configure(device="cpu")
        with config_scope(AutoRoundConfig("given"), device="cuda") as innermost:
            assert (get_config().model_path, innermost.device) == ("given", "cuda")
            assert load_config(tmp_path / "c.json") is innermost
            assert innermost.model_path == "from file"
        with config_scope({"quantization": {"bits": 8}}):
            assert (get_config().quantization.bits, get_config().device) == (8, "auto")
        with pytest.raises(ConfigurationError), config_scope(device="nowhere"):
            pytest.fail("it began")
        assert get_config() is inner
        with pytest.raises(KeyError), config_scope(device="cuda"):
            raise KeyError
        assert (get_config(), inner.device) == (inner, "cpu")
    assert get_config() is outer
    assert (outer.device, outer.quantization.bits, outer.quantization.group_size) == ("auto", 3, 128)


def test_a_scope_leaves_what_it_began_with_alone():
    given = AutoRoundConfig("model")
    with config_scope(given):
        configure(model_path="other")
    assert given == AutoRoundConfig("model")


def test_a_scope_is_not_seen_by_other_threads():
    inside, looked = threading.Event(), threading.Event()
    seen = []

    def other():
        inside.wait(10)
        seen.append(get_config().quantization.bits)
        looked.set()

    # Started outside of the scope, in the context that the test has.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(other,))
    thread.start()
    with config_scope(quantization={"bits": 2}):
        inside.set()
        assert looked.wait(10)
        started_within = threading.Thread(target=contextvars.copy_context().run, args=(other,))
        started_within.start()
        started_within.join()
    thread.join()
    assert seen == [4, 2]


def test_a_scope_is_not_seen_by_other_tasks():
    async def one(bits, others):
        with config_scope(quantization={"bits": bits}):
            for _ in range(5):
                await asyncio.sleep(0)
                assert get_config().quantization.bits == bits
                configure(quantization={"seed": bits})
            others.append(await asyncio.create_task(child()))
        return get_config().quantization.bits

    async def child():
        return get_config().quantization.bits

    async def main():
        children = []
        outside = await asyncio.gather(one(2, children), one(3, children), one(8, children), child())
        return outside, sorted(children)

    assert asyncio.run(main()) == ([4, 4, 4, 4], [2, 3, 8])
    assert get_config().quantization.seed == 42


def test_at_no_line_of_an_update_could_half_of_it_be_read():
    config = AutoRoundConfig()
    seen = []

    def look(frame, event, argument):
        values = config.to_dict()
        area = config.quantization
        assert (area.bits, area.group_size) == (area.to_dict()["bits"], area.to_dict()["group_size"])
        seen.append(
            (area.bits, area.group_size, values["quantization"]["bits"], values["memory"]["gpu_batch_size"])
        )
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        config.update(quantization={"bits": 2, "group_size": 32}, memory={"gpu_batch_size": 1})
    finally:
        sys.settrace(before)
    assert len(seen) > 50
    assert list(dict.fromkeys(seen)) == [(4, 128, 4, 8), (2, 32, 2, 1)]


@contextmanager
def all_running(threads):
    """Threads that take turns far more often than usual; at the end all are awaited."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_no_thread_sees_half_of_an_update():
    config = AutoRoundConfig()
    pairs = [(2, 32, 1), (8, 128, 2), (3, 64, 3)]
    allowed = {(4, 128, 8), *pairs}
    stop = threading.Event()
    wrong, reads = [], []

    def write(bits, group_size, batch):
        while not stop.is_set():
            config.update(
                quantization={"bits": bits, "group_size": group_size}, memory={"gpu_batch_size": batch}
            )

    def read():
        count = 0
        while not stop.is_set():
            area = config.quantization
            values = config.to_dict()
            whole = values["quantization"]["bits"], values["quantization"]["group_size"]
            whole = (*whole, values["memory"]["gpu_batch_size"])
            if (area.bits, area.group_size) not in {entry[:2] for entry in allowed} or whole not in allowed:
                wrong.append((area, values))
            count += 1
        reads.append(count)

    threads = [threading.Thread(target=write, args=pair) for pair in pairs]
    with all_running([*threads, *(threading.Thread(target=read) for _ in range(2))]):
        stop.wait(0.5)
        stop.set()
    assert not wrong
    assert min(reads) > 10


def test_no_update_is_lost():
    config = AutoRoundConfig()
    fields = ["seed", "iters", "nsamples", "seqlen"]
    lost = []

    def count(field):
        for number in range(1, 201):
            setattr(config.quantization, field, number)
            if getattr(config.quantization, field) != number:
                lost.append((field, number))

    with all_running([threading.Thread(target=count, args=(field,)) for field in fields]):
        pass
    assert not lost
    assert [getattr(config.quantization, field) for field in fields] == [200] * 4
