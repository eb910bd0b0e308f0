"""A ternary language model is trained by llm-trainer's loop and deployed, as installed from wheels."""

import copy
import sysconfig
from pathlib import Path

import torch
from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitlayers.utils import deploy_layers, ternary_layers
from bitmodels.utils import analyze_model, replace_linear_layers
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Trainer


def test_the_wheel_brings_its_kernels():
    assert "can serve" in KernelRegistry.explain(BitQuantConfig())["avx2"]
    assert KernelRegistry.get_kernel_for_config(BitQuantConfig()).has_cpp_backend


def test_a_ternary_model_is_trained_by_the_loop_of_llm_trainer(tmp_path: Path):
    torch.set_num_threads(1)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("a*.py"))]
    tokenizer = BPETokenizer()
    tokenizer.train(texts, vocab_size=512)
    dataset = LanguageModelingDataset(texts, tokenizer, max_length=64)
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_heads": 2, "n_layers": 2, "d_ff": 128, "max_seq_len": 64, "dropout": 0.0}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes)
    model = replace_linear_layers(TransformerLM(config), exclude=["head"], norm=True, subclasses=True)
    assert len(ternary_layers(model)) == 8
    trainer = Trainer(
        model,
        tokenizer,
        TrainingConfig(
            batch_size=8, learning_rate=3e-3, max_steps=160, logging_steps=10, checkpoint_dir=str(tmp_path)
        ),
        train_dataset=dataset,
        eval_dataset=torch.utils.data.Subset(dataset, range(32)),
        show_progress=False,
    )
    before = trainer.evaluate()["loss"]
    trainer.train()
    after = trainer.evaluate()["loss"]
    assert after < before - 1

    ids = torch.tensor([dataset[0]["input_ids"].tolist()])
    with torch.no_grad():
        trained = model.eval()(ids)
        deployed = deploy_layers(copy.deepcopy(model))
        assert torch.equal(outputs(deployed(ids)), outputs(trained))
    assert analyze_model(deployed)["is_deployed"]


def outputs(found):
    return found if isinstance(found, torch.Tensor) else found.logits
