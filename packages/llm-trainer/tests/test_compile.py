import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.models import TransformerLM
from llm_trainer.models._compile import compile_blocks_
from llm_trainer.training import Callback, Trainer
from llm_trainer.training._checkpoint_folder import newest_checkpoint
from torch._dynamo.callback import callback_handler as compiler_callbacks
from torch._dynamo.utils import counters

pytestmark = [
    # torch's own access, when it traces a function that defines its own gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # The same in torch 2.9, and the compiler's imports and its view of Python 3.13.0 in torch 2.11.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses_and_gradients(model, batches, seed=3):
    torch.manual_seed(seed)
    losses = []
    for ids, mask in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, mask, ids, return_logits=False).loss
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return losses, gradients


def batches(tiny):
    def draw(rows, tokens):
        return torch.randint(0, tiny.vocab_size, (rows, tokens))

    packed = torch.tensor([[1] * 5 + [2] * 12, [1] * 17, [1] * 9 + [0] * 8])
    return [(draw(3, 17), None), (draw(2, 24), None), (draw(3, 17), packed), (draw(1, 11), None)]


def test_compiled_blocks_compute_what_the_others_do_at_any_shape(build, tiny):
    model = build(
        norm="rmsnorm", positions="rope", activation="swiglu", n_kv_heads=2, gradient_checkpointing=True
    ).train()
    work = batches(tiny)
    names = list(model.state_dict())
    expected_losses, expected = losses_and_gradients(model, work)
    compile_blocks_(model)
    found_losses, found = losses_and_gradients(model, work)
    assert found_losses == pytest.approx(expected_losses, rel=5e-3)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, name
    assert list(model.state_dict()) == names

    counters.clear()
    losses_and_gradients(model, [(torch.randint(0, 61, (rows, rows * 3)), None) for rows in range(2, 8)])
    assert counters["stats"]["unique_graphs"] == 0

    prompt = model.generate(work[0][0][:, :5], 12)
    plain = TransformerLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.generate(work[0][0][:, :5], 12), prompt)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(prompt).logits, plain(prompt).logits, atol=1e-5, rtol=1e-5)


def test_dropout_of_compiled_blocks_continues_from_a_saved_state_to_the_bit(tiny):
    work = [batch for batch in batches(tiny) if batch[1] is None]
    torch.manual_seed(5)
    config = dataclasses.replace(tiny, dropout=0.3, attention_dropout=0.2, n_layers=1)
    weights = TransformerLM(config).state_dict()

    def start():
        torch.compiler.reset()
        model = TransformerLM(config).train()
        model.load_state_dict(weights)
        compile_blocks_(model)
        return model

    def run(model, batches):
        for ids, mask in batches:
            model(ids, mask, ids, return_logits=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model = start()
    torch.manual_seed(7)
    run(model, work[:1])
    model.zero_grad()
    state = torch.get_rng_state()
    whole = run(model, work[1:])
    resumed = start()
    torch.set_rng_state(state)
    for expected, found in zip(whole, run(resumed, work[1:]), strict=True):
        assert torch.equal(expected, found)
    model.zero_grad()
    assert not all(map(torch.equal, whole, run(model, work[1:])))


# In a process of its own: after a failure torch leaves its own evaluator of frames in place.
WITHOUT_COMPILER = """
import sys
from pathlib import Path
from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig
from llm_trainer.exceptions import TrainingError
from llm_trainer.models import TransformerLM
from llm_trainer.models._compile import compile_blocks_
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Trainer

folder, texts = Path(sys.argv[1]), ["words that are learned from"] * 50
tokenizer = BPETokenizer()
tokenizer.train(texts, vocab_size=270)
model = TransformerLM(ModelConfig(vocab_size=270, d_model=32, n_heads=2, n_layers=1, d_ff=48, max_seq_len=32))
try:
    compile_blocks_(model)
except TrainingError as error:
    print(error)
text, out = folder / "text.txt", folder / "out"
text.write_text("\\n".join(texts))
config = TrainingConfig(
    compile_model=True, output_dir=str(out), checkpoint_dir=str(folder / "checkpoints"), report_to=()
)
trainer = Trainer(model, tokenizer, config, None, device="cpu", show_progress=False)
try:
    trainer.train_from_config(model.config, DataConfig(train_file=str(text), max_length=24, min_length=1))
except TrainingError as error:
    print(error)
print(out.exists())
"""


def test_a_missing_compiler_is_found_at_the_start_and_before_the_text_is_read(tmp_path):
    missing = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, **missing},
        capture_output=True,
        text=True,
        check=True,
    )
    alone, at_the_start, written = done.stdout.splitlines()
    for message in (alone, at_the_start):
        assert re.search(r"C\+\+ compiler.*CXX.*compile_model=False", message)
    assert written == "False"


@pytest.fixture
def make_trainer(tokenizer, corpus, tmp_path):
    # Documents of unequal length, each a row, of which a batch is as long as the longest.
    texts = [text[: 9 + 4 * number] for number, text in enumerate(corpus[:10])]
    rows = LanguageModelingDataset(texts, tokenizer, max_length=32, pack_sequences=False)

    def make(folder, *callbacks, seed=0, n_layers=2, **settings):
        torch.manual_seed(seed)
        model = TransformerLM(
            ModelConfig(
                vocab_size=tokenizer.vocab_size,
                d_model=32,
                n_heads=2,
                n_layers=n_layers,
                d_ff=48,
                max_seq_len=32,
                positions="rope",
                dropout=0.2,
                attention_dropout=0.1,
            )
        )
        defaults = {"batch_size": 3, "max_steps": 6, "save_steps": 100, "report_to": (), "logging_steps": 1}
        config = TrainingConfig(
            **(defaults | settings), compile_model=True, checkpoint_dir=str(tmp_path / folder)
        )
        return Trainer(model, tokenizer, config, rows, None, callbacks, device="cpu", show_progress=False)

    return make


class Terminate(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def assert_equal_runs(one, other):
    assert [(r.step, r.train_loss) for r in one.history] == [(r.step, r.train_loss) for r in other.history]
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_a_compiled_run_is_resumed_to_the_bit(make_trainer):
    whole = make_trainer("whole", Terminate(-1))
    whole.train()
    assert whole.model.run_block is not TransformerLM(whole.model.config).run_block
    with pytest.raises(SystemExit):
        make_trainer("part", Terminate(3)).train()
    torch.compiler.reset()
    resumed = make_trainer("part", Terminate(-1), seed=4)
    resumed.train("latest")
    assert resumed.resumed_after == [3]
    assert_equal_runs(whole, resumed)


def test_layers_share_their_graphs(make_trainer):
    graphs = []
    for n_layers in (1, 4):
        torch.compiler.reset()
        counters.clear()
        make_trainer(str(n_layers), n_layers=n_layers, max_steps=4).train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]


@pytest.mark.slow
def test_a_signal_within_the_compiler_ends_it_and_changes_no_bit(make_trainer, tmp_path, monkeypatch):
    # Or an earlier run's code would be found, and there would be nothing to cut short.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    timers = []

    def send_soon(*_):
        # The compiler is at the first of the blocks: what only tries it out comes before the training.
        if part._loop is not None and not timers:
            timers.append(threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)))
            timers[0].start()

    part = make_trainer("part")
    compiler_callbacks.register_start_callback(send_soon)
    try:
        with pytest.raises(SystemExit) as ended:
            part.train()
    finally:
        compiler_callbacks.remove_start_callback(send_soon)
        for timer in timers:
            timer.cancel()
    assert (ended.value.code, part.compiles_first_step) == (143, True)
    newest, passed = newest_checkpoint(tmp_path / "part")
    assert (newest.step, passed) == (0, [])
    # In this process, as after a new start.
    resumed = make_trainer("part", seed=4)
    resumed.train("latest")
    whole = make_trainer("whole")
    whole.train()
    assert_equal_runs(whole, resumed)
