"""Every public name is where the documentation says, with its parameters and defaults."""

import importlib
import inspect
import subprocess
import sys

import pytest
from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig

NAMES = {
    "llm_trainer.config": "ModelConfig TrainingConfig DataConfig"
    " RunConfig calculate_parameters estimate_memory_usage",
    "llm_trainer.models": "TransformerLM",
    "llm_trainer.tokenizer": "BPETokenizer CharTokenizer HFTokenizer"
    " create_tokenizer load_tokenizer Tokenizer",
    "llm_trainer.data": "LanguageModelingDataset create_dataloader load_splits"
    " read_texts read_dataset TokenStore",
    "llm_trainer.training": "Trainer Callback EarlyStopping TrainingHistory",
    "llm_trainer.training.optimizer": "create_optimizer",
    "llm_trainer.training.scheduler": "create_scheduler",
    "llm_trainer.training.utils": "set_seed get_device setup_logging"
    " save_checkpoint load_checkpoint get_memory_usage",
    "llm_trainer.utils.metrics": "compute_perplexity compute_bleu_score compute_diversity_metrics"
    " compute_repetition_metrics evaluate_generation_quality bits_per_byte",
    "llm_trainer.exceptions": "TokenizerNotTrainedException ModelConfigurationError"
    " TrainingError GenerationError",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    found = importlib.import_module(module)
    for name in NAMES[module].split():
        assert hasattr(found, name), name
        assert name in found.__all__, name
        assert inspect.getdoc(getattr(found, name)), name


def test_defaults():
    model = ModelConfig()
    assert (model.vocab_size, model.d_model, model.n_heads, model.n_layers, model.d_ff) == (
        50000, 768, 12, 12, 3072,
    )  # fmt: skip
    assert (model.max_seq_len, model.dropout, model.attention_dropout, model.activation) == (
        1024, 0.1, 0.1, "gelu",
    )  # fmt: skip
    assert (model.pre_norm, model.use_learned_pos_emb, model.gradient_checkpointing) == (True, False, False)
    assert model.d_head == 64
    training = TrainingConfig()
    assert (training.batch_size, training.learning_rate, training.weight_decay) == (32, 1e-4, 0.01)
    assert (training.num_epochs, training.max_steps, training.lr_scheduler) == (10, None, "cosine")
    assert (training.warmup_steps, training.warmup_ratio, training.min_lr_ratio) == (1000, 0.1, 0.1)
    assert (training.optimizer, training.max_grad_norm, training.gradient_accumulation_steps) == (
        "adamw", 1.0, 1,
    )  # fmt: skip
    assert (training.use_amp, training.amp_dtype, training.save_steps) == (True, "float16", 1000)
    assert (training.checkpoint_dir, training.eval_steps, training.eval_strategy) == (
        "./checkpoints", 500, "steps",
    )  # fmt: skip
    assert (training.logging_steps, tuple(training.report_to)) == (100, ("tensorboard",))
    assert (training.world_size, training.local_rank, training.effective_batch_size) == (1, -1, 32)
    assert TrainingConfig(gradient_accumulation_steps=4).effective_batch_size == 128
    data = DataConfig()
    assert (data.dataset_name, data.dataset_config, data.dataset_split, data.validation_split) == (
        "wikitext", "wikitext-103-raw-v1", "train", "validation",
    )  # fmt: skip
    assert (data.text_column, data.max_length, data.min_length, data.vocab_size) == ("text", 1024, 10, 50000)
    assert (data.pack_sequences, data.preprocessing_num_workers, data.dataloader_num_workers) == (True, 4, 4)
    assert (data.train_file, data.validation_file) == (None, None)


METHODS = {
    "llm_trainer.models.TransformerLM": "forward generate get_num_params get_model_size_mb save_pretrained"
    " from_pretrained export_hf from_hf",
    "llm_trainer.tokenizer.BPETokenizer": "train train_from_dataset encode decode save_pretrained"
    " from_pretrained get_vocab_stats vocab_size vocab special_tokens",
    "llm_trainer.training.Trainer": "train train_from_config evaluate generate_text save_model"
    " from_pretrained _train_epoch _evaluate _save_checkpoint _load_checkpoint",
    "llm_trainer.data.LanguageModelingDataset": "__len__ __getitem__ pack_sequences get_stats",
    "llm_trainer.config.ModelConfig": "save load to_dict from_dict d_head preset",
}


@pytest.mark.parametrize("path", METHODS)
def test_methods(path):
    module, name = path.rsplit(".", 1)
    owner = getattr(importlib.import_module(module), name)
    for method in METHODS[path].split():
        assert method.startswith("__") or inspect.getdoc(getattr(owner, method)), method


def test_importing_the_package_loads_no_torch():
    code = "import llm_trainer, sys; print('torch' in sys.modules, llm_trainer.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
