import subprocess
import sys

import pytest
from llm_trainer.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    calculate_parameters,
    estimate_memory_usage,
)
from llm_trainer.exceptions import ConfigurationError, FormatError, LLMTrainerError, ModelConfigurationError


def test_defaults_are_the_published_ones():
    model = ModelConfig()
    assert (model.vocab_size, model.d_model, model.n_heads, model.n_layers, model.d_ff) == (
        50000,
        768,
        12,
        12,
        3072,
    )
    assert (model.max_seq_len, model.dropout, model.attention_dropout, model.activation) == (
        1024,
        0.1,
        0.1,
        "gelu",
    )
    assert (model.pre_norm, model.use_learned_pos_emb, model.gradient_checkpointing) == (True, False, False)
    training = TrainingConfig()
    assert (training.batch_size, training.learning_rate, training.weight_decay) == (32, 1e-4, 0.01)
    assert (training.num_epochs, training.max_steps, training.lr_scheduler) == (10, None, "cosine")
    assert (training.warmup_steps, training.warmup_ratio, training.min_lr_ratio) == (1000, 0.1, 0.1)
    assert (training.optimizer, training.max_grad_norm, training.gradient_accumulation_steps) == (
        "adamw",
        1.0,
        1,
    )
    assert (training.use_amp, training.amp_dtype, training.eval_steps) == (True, "float16", 500)
    assert (training.eval_strategy, training.logging_steps, training.world_size) == ("steps", 100, 1)
    assert training.local_rank == -1
    data = DataConfig()
    assert (data.max_length, data.min_length, data.vocab_size, data.pack_sequences) == (1024, 10, 50000, True)


def test_properties():
    assert ModelConfig(1000, 64, 4).d_head == 16
    assert TrainingConfig(batch_size=8, gradient_accumulation_steps=3).effective_batch_size == 24


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(vocab_size=300, d_model=64, n_heads=4, positions="learned", logit_softcap=15.0),
        TrainingConfig(betas=(0.8, 0.95), max_steps=7, warmup_steps=None),
        DataConfig(train_file="a.txt", file_patterns=("*.py", "*.md")),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_saved_configuration_loads_equal(config, ending, tmp_path):
    path = tmp_path / f"config.{ending}"
    config.save(path)
    assert type(config).load(path) == config


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-4\n")
    assert TrainingConfig.load(path).learning_rate == 1e-4


def test_learned_positions_have_two_names():
    assert ModelConfig(use_learned_pos_emb=True).positions == "learned"
    assert ModelConfig(positions="learned").use_learned_pos_emb is True
    with pytest.raises(ModelConfigurationError, match="contradicts"):
        ModelConfig(use_learned_pos_emb=True, positions="rope")


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ModelConfigurationError, match="'n_layer'; did you mean 'n_layers'"):
        ModelConfig.from_dict({"n_layer": 3})
    with pytest.raises(ConfigurationError, match="known keys: batch_size"):
        TrainingConfig.from_dict({"zzz": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 768, "n_heads": 5}, r"d_model \(768\) must be a multiple of n_heads \(5\).*765 and 770"),
        ({"n_heads": 12, "n_kv_heads": 5}, "multiple of n_kv_heads"),
        ({"vocab_size": 0}, r"vocab_size is 0; it must be an integer of at least 1"),
        ({"n_layers": "12"}, r"n_layers is '12'"),
        ({"dropout": 1.0}, "at least 0 and below 1"),
        ({"activation": "gulu"}, '"swiglu"'),
        ({"positions": "rope", "d_model": 12, "n_heads": 4}, "must be even, not 3"),
        ({"bias": 1}, "True or False"),
        ({"logit_softcap": 0.0}, "above 0 or None"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(ModelConfigurationError, match=message) as caught:
        ModelConfig(**fields)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, LLMTrainerError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"betas": (0.9, 1.0)}, "two numbers"),
        ({"optimizer": "adamx"}, '"adamw"'),
        ({"world_size": 2}, "only world_size=1"),
        ({"local_rank": 1}, "only world_size=1"),
        ({"warmup_ratio": 1.5}, "at most 1"),
        ({"world_size": 1.0}, "world_size is 1.0; it must be an integer"),
        ({"local_rank": False}, "local_rank is False; it must be an integer"),
        ({"output_dir": True}, "a path or None"),
        ({"seed": 2**64}, f"at most {2**64 - 1}"),
        ({"learning_rate": 10**400}, "above 0"),
        ({"betas": [10**400, 0.9]}, "two numbers"),
        ({"eval_strategy": True}, '"no"'),
    ],
)
def test_impossible_training_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        TrainingConfig(**fields)


def test_impossible_data_is_refused():
    with pytest.raises(ConfigurationError, match="file_patterns"):
        DataConfig(file_patterns="*.txt")  # type: ignore[arg-type] - the mistake under test
    with pytest.raises(ConfigurationError, match="at least 259"):
        DataConfig(vocab_size=258)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: calculate_parameters({}), r"be a ModelConfig, .* type dict: {}; .* ModelConfig.from_dict\("),
        (lambda: estimate_memory_usage(TrainingConfig()), "ModelConfig, but is of type TrainingConfig"),
        (lambda: ModelConfig.from_dict(None), "What ModelConfig.from_dict takes must be a Mapping.*None"),
        (lambda: TrainingConfig.from_dict("x"), "type str: 'x'"),
        (lambda: RunConfig.from_dict([1]), r"RunConfig.from_dict takes must be a Mapping.*\[1\]"),
        (lambda: RunConfig(model={}), "model must be a ModelConfig"),
        (lambda: RunConfig(training=None), "training must be a TrainingConfig"),
        (lambda: RunConfig(data=ModelConfig()), "data must be a DataConfig"),
    ],
)
def test_objects_of_another_type_are_refused(use, message):
    with pytest.raises(ConfigurationError, match=message):
        use()


@pytest.mark.parametrize(
    ("steps", "ratio", "total", "expected"),
    [(1000, 0.1, 300, 30), (1000, 0.1, 50_000, 1000), (20, None, 300, 20), (None, 0.5, 300, 150), (None,
    None, 9, 0),
     (20, None, 5, 5), (0, 0.1, 300, 0)],
)  # fmt: skip
def test_the_smaller_bound_is_the_warm_up(steps, ratio, total, expected):
    assert TrainingConfig(warmup_steps=steps, warmup_ratio=ratio).resolve_warmup_steps(total) == expected


def test_an_unknown_attribute_names_the_nearest():
    config = TrainingConfig()
    with pytest.raises(ConfigurationError, match="'learning_rat'; did you mean 'learning_rate'"):
        config.learning_rat = 5
    config.learning_rate = 5.0
    assert config.learning_rate == 5.0
    with pytest.raises(ModelConfigurationError, match="'layers'; did you mean 'n_layers'"):
        ModelConfig().layers = 3


def test_a_bare_no_in_yaml_is_the_word(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("eval_strategy: no\n")
    assert TrainingConfig.load(path).eval_strategy == "no"


def test_hostile_yaml_is_refused_at_once(tmp_path):
    path = tmp_path / "config.yaml"
    # Lists of nine times the list before, 9**12 words when written out.
    layers = ["- &a0 [lol,lol]", *(f"- &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 13))]
    bomb = "\n".join(f"  {line}" for line in layers)
    for content in (
        f"batch_size:\n{bomb}\n",
        f"betas:\n{bomb}\n",
        f"output_dir:\n{bomb}\n",
        f"optimizer:\n{bomb}\n",
        f"0x{'f' * 20000}: 1\n",
        f"batch_size: 0x{'f' * 20000}\n",
        f"batch_size: {'9' * 5000}\n",
        "batch_size: " + "[" * 5000,
        "batch_size: 2026-99-99\n",
    ):
        path.write_text(content)
        with pytest.raises(ConfigurationError) as caught:
            TrainingConfig.load(path)
        assert len(str(caught.value)) < 2000
    path.write_text(f"file_patterns:\n{bomb}\n")
    with pytest.raises(ConfigurationError, match="file_patterns"):
        DataConfig.load(path)


@pytest.mark.parametrize("content", ['{"d_ff": ' + "9" * 5000 + "}", "[" * 100_000], ids=["digits", "depth"])
def test_hostile_json_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(FormatError, match="not valid JSON"):
        ModelConfig.load(path)


@pytest.mark.parametrize("size", [10**30, 2**62])
def test_sizes_beyond_all_memory_are_refused(size):
    with pytest.raises(ModelConfigurationError, match="at most 2147483647"):
        ModelConfig(d_ff=size)


def test_files_that_hold_something_else(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FormatError, match="does not exist"):
        ModelConfig.load(path)
    path.write_text("[1]")
    with pytest.raises(FormatError, match="must hold a JSON object"):
        ModelConfig.load(path)
    path = tmp_path / "config.yaml"
    path.write_text("- 1")
    with pytest.raises(ConfigurationError, match="mapping"):
        ModelConfig.load(path)
    with pytest.raises(ConfigurationError, match=r"must end in \.json"):
        ModelConfig.load(tmp_path / "config.toml")


@pytest.mark.parametrize("kind", [ModelConfig, RunConfig])
@pytest.mark.parametrize(
    ("ending", "error"), [("json", FormatError), ("yaml", ConfigurationError), ("yml", ConfigurationError)]
)
def test_a_folder_is_no_configuration(tmp_path, kind, ending, error):
    path = tmp_path / f"d.{ending}"
    path.mkdir()
    with pytest.raises(error, match=rf"d\.{ending} cannot be read: Is a directory"):
        kind.load(path)


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, llm_trainer, llm_trainer.config, llm_trainer.exceptions, llm_trainer.tokenizer;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
