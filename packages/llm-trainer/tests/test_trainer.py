import io
import json
import logging
import math
import os
import shutil
import signal
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset, create_dataloader
from llm_trainer.exceptions import (
    ConfigurationError,
    DataError,
    FormatError,
    ModelConfigurationError,
    TrainingError,
)
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import (
    Callback,
    EarlyStopping,
    HistoryRecord,
    Trainer,
    TrainingHistory,
    loss_curve_svg,
    save_loss_curve,
    set_seed,
)
from llm_trainer.training._precision import Precision
from llm_trainer.training._step import take_step
from llm_trainer.training.plots import _draw
from llm_trainer.utils.metrics import bits_per_byte, compute_perplexity, perplexity_of
from torch.utils.data import Subset


@pytest.fixture
def dataset(tokenizer, corpus):
    return LanguageModelingDataset(corpus[:16], tokenizer, max_length=24)


@pytest.fixture
def make_trainer(tokenizer, dataset):
    def make(*, callbacks=(), train=dataset, evaluation=None, dropout=0.0, **settings):
        set_seed(7)
        model = TransformerLM(
            ModelConfig(
                vocab_size=tokenizer.vocab_size,
                d_model=32,
                n_heads=2,
                n_layers=2,
                d_ff=64,
                max_seq_len=64,
                dropout=dropout,
                attention_dropout=dropout,
                norm="rmsnorm",
                positions="rope",
            )
        )
        defaults = {
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "use_amp": False,
            "warmup_steps": 0,
            "checkpoint_dir": None,
            "report_to": (),
        }
        config = TrainingConfig(**(defaults | settings))
        return Trainer(
            model, tokenizer, config, train, evaluation, callbacks, device="cpu", show_progress=False
        )

    return make


class At(Callback):
    """Does something after one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.action(trainer)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_a_short_text_is_learned_by_heart(make_trainer, tokenizer):
    text = "def function_3(value):\n    return value * 3 + 9"
    data = LanguageModelingDataset([text], tokenizer, max_length=64)
    trainer = make_trainer(train=data, evaluation=data, max_steps=150, batch_size=1, use_amp=True)
    history = trainer.train()
    assert history.eval_losses[-1][0] == 150
    assert history.eval_losses[-1][1] < 0.02
    assert trainer.generate_text("def", max_length=64) == text


def test_same_seed_same_weights_to_the_bit(make_trainer):
    results = []
    for seed in (1, 1, 2):
        trainer = make_trainer(dropout=0.2, seed=seed, use_amp=True, gradient_accumulation_steps=2)
        trainer.train()
        results.append(weights(trainer))
    first, second, other = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 1, 2), (1, 8)])
def test_small_batches_together_equal_a_large_one(make_trainer, tokenizer, corpus, sizes):
    # Documents of unequal length, one a row: each batch has another number of tokens to predict.
    texts = [text[: 9 + 7 * number] for number, text in enumerate(corpus[: sum(sizes)])]
    data = LanguageModelingDataset(texts, tokenizer, max_length=40, pack_sequences=False)
    rows = [data[index] for index in range(sum(sizes))]

    def stack(part):
        return {name: torch.stack([row[name] for row in part]) for name in part[0]}

    parts, start = [], 0
    for size in sizes:
        parts.append(stack(rows[start : start + size]))
        start += size
    gradients, losses = [], []
    for batches in ([stack(rows)], parts):
        trainer = make_trainer()
        seen = {}
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(
            lambda *_, model=trainer.model, seen=seen: seen.update(
                {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            )
        )
        precision = Precision(trainer.config, trainer.device)
        result = take_step(trainer.model, batches, optimizer, precision, trainer.device, None)
        gradients.append(seen)
        losses.append(result.loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


def test_the_last_partial_window_is_a_step(make_trainer, dataset):
    batches = math.ceil(len(dataset) / 4)
    assert batches % 3
    trainer = make_trainer(max_steps=None, num_epochs=2, gradient_accumulation_steps=3, logging_steps=1)
    history = trainer.train()
    assert len(history) == 2 * math.ceil(batches / 3)
    assert history.records[-1].tokens == 2 * dataset.get_stats()["num_tokens"]


def test_clipping_bounds_the_update(make_trainer):
    before = weights(make_trainer())
    trainer = make_trainer(
        optimizer="sgd", weight_decay=0.0, learning_rate=1.0, max_grad_norm=1e-3, max_steps=1
    )
    history = trainer.train()
    assert history.records[0].grad_norm > 1e-2
    moved = torch.stack(
        [(parameter - before[name]).norm() for name, parameter in trainer.model.named_parameters()]
    ).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rates_of_a_run(make_trainer):
    trainer = make_trainer(
        max_steps=10, warmup_steps=4, warmup_ratio=None, lr_scheduler="linear", logging_steps=1
    )
    rates = [record.lr for record in trainer.train()]
    expected = [0.01 * (step + 1) / 4 for step in range(4)] + [
        0.01 * (1 - 0.9 * step / 5) for step in range(6)
    ]
    assert rates == pytest.approx(expected)


def poison(trainer):
    with torch.no_grad():
        trainer.model.final_norm.weight[0] = torch.nan


def test_steps_that_are_not_finite_change_nothing_and_are_counted(make_trainer, monkeypatch):
    broken = {2, 3, 5}
    calls = iter(range(1, 100))

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        factor = torch.nan if next(calls) in broken else 1.0
        return type(output)(output.loss * factor, None)

    trainer = make_trainer(logging_steps=1)
    original = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", forward)
    states = []
    trainer.callbacks = [
        At(step, lambda trainer: states.append(weights(trainer))) for step in range(1, 7)
    ]  # fmt: skip
    history = trainer.train()
    assert [record.skipped_steps for record in history] == [0, 1, 2, 2, 3, 3]
    assert [record.train_loss is None for record in history] == [step in broken for step in range(1, 7)]
    for step in range(2, 7):
        same = all(torch.equal(states[step - 1][name], states[step - 2][name]) for name in states[0])
        assert same == (step in broken)


def test_too_many_bad_steps_in_a_row_are_an_error(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=50, max_skipped_steps=3, output_dir=tmp_path, callbacks=[At(5, poison)])
    with pytest.raises(TrainingError, match="not finite in 4 steps in a row, up to step 9"):
        trainer.train()
    assert (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_interrupt_ends_after_the_step_in_hand(make_trainer, dataset, tmp_path, moment, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(
        max_steps=50, evaluation=dataset, eval_steps=3, output_dir=tmp_path, logging_steps=1
    )
    if moment == "step":
        trainer.callbacks = [At(2, press)]
        last = 2
    else:
        original = TransformerLM.eval
        monkeypatch.setattr(TransformerLM, "eval", lambda self: (press(), original(self))[1])
        last = 3
    with pytest.raises(KeyboardInterrupt, match=f"after step {last} of 50"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
    records = TrainingHistory.load(tmp_path / "history.jsonl").records
    assert [record.step for record in records] == list(range(1, last + 1))
    assert records[-1].eval_loss is None
    assert math.isfinite(trainer.evaluate()["loss"]) if moment == "step" else True
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_a_callback_can_stop(make_trainer):
    trainer = make_trainer(
        max_steps=50, callbacks=[At(4, lambda trainer: setattr(trainer, "should_stop", True))]
    )
    assert trainer.train().records[-1].step == 4


def test_a_stopped_run_ends_with_an_evaluation(make_trainer, dataset):
    def stop(trainer):
        trainer.should_stop = True

    for strategy, expected in (("steps", [4]), ("epoch", [4]), ("no", [])):
        trainer = make_trainer(
            max_steps=50, evaluation=dataset, eval_strategy=strategy, batch_size=1, callbacks=[At(4, stop)]
        )
        assert [step for step, _ in trainer.train().eval_losses] == expected


def press(*_):
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_heard_when_a_callback_evaluates(make_trainer, dataset):
    def evaluate(trainer):
        trainer.evaluate()
        press()
        trainer.evaluate()

    trainer = make_trainer(evaluation=dataset, max_steps=50, callbacks=[At(2, evaluate)])
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 50"):
        trainer.train()


def test_an_ignored_ctrl_c_stays_ignored(make_trainer):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert make_trainer(callbacks=[At(2, press)]).train().records[-1].step == 6
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_early_failure_leaves_the_terminal_alone(make_trainer, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    threads = threading.active_count()
    trainer = make_trainer()
    trainer._show_progress = True
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to optimise"):
        trainer.train()
    assert threading.active_count() == threads
    assert terminal.getvalue() == ""
    trainer.model.requires_grad_(True)
    trainer.train()
    shown = terminal.getvalue()
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_an_output_folder_that_cannot_be_written_to_is_found_first(make_trainer, tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(output_dir=tmp_path / "file" / "run")
    with pytest.raises(OSError, match="file"):
        trainer.train()
    assert trainer.step == 0


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_disk_that_fails_later_does_not_end_training(make_trainer, dataset, tmp_path, caplog, interrupted):
    def fail(trainer):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()

    trainer = make_trainer(
        output_dir=tmp_path / "run", evaluation=dataset, eval_steps=3, callbacks=[At(2, fail)]
    )
    if interrupted:
        trainer.callbacks.append(At(4, press))
    with pytest.raises(KeyboardInterrupt if interrupted else OSError):
        trainer.train()
    assert trainer.step == (4 if interrupted else 6)
    assert "history cannot be written" in caplog.text


def test_evaluating_changes_no_weight(make_trainer, dataset):
    results = []
    for settings in ({"eval_strategy": "no"}, {"eval_steps": 1}):
        trainer = make_trainer(dropout=0.2, evaluation=dataset, **settings)
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_evaluation_leaves_each_module_its_mode(make_trainer, dataset):
    trainer = make_trainer(evaluation=dataset)
    trainer.model.train()
    trainer.model.embedding.eval()
    trainer.evaluate()
    trainer.model.generate(torch.zeros(1, 1, dtype=torch.long), 4)
    assert trainer.model.training
    assert not trainer.model.embedding.training
    assert trainer.model.blocks[0].training


@pytest.mark.parametrize("what", ["labels", "all"])
def test_steps_without_a_label_change_nothing(make_trainer, dataset, what):
    row = dict(dataset[0])
    row["labels"] = torch.full_like(row["labels"], -100)
    if what == "all":
        row["attention_mask"] = torch.zeros_like(row["attention_mask"])
    before = weights(make_trainer())
    trainer = make_trainer(train=[row] * 4, weight_decay=0.5, logging_steps=1, lr_scheduler="linear")
    history = trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert [record.lr for record in history] == [0.01] * 6
    assert {(record.train_loss, record.grad_norm, record.skipped_steps) for record in history} == {
        (None, None, 0)
    }


def test_a_history_holds_no_number_that_json_lacks(make_trainer, dataset, tmp_path):
    trainer = make_trainer(evaluation=dataset, output_dir=tmp_path, callbacks=[At(5, poison)])
    history = trainer.train()
    assert math.isnan(history.eval_losses[-1][1])
    assert math.isnan(trainer.evaluate()["perplexity"])

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=refuse)["eval_loss"] is None
    assert perplexity_of(710) == math.inf
    assert perplexity_of(2.0) == pytest.approx(math.exp(2))


def test_callbacks_are_called_in_order(make_trainer, dataset):
    calls = []

    class Recorder(Callback):
        def on_train_begin(self, trainer):
            calls.append("begin")

        def on_step_end(self, trainer):
            calls.append(trainer.step)

        def on_record(self, trainer, record):
            calls.append(record)

        def on_train_end(self, trainer):
            calls.append("end")

    trainer = make_trainer(max_steps=4, eval_steps=2, evaluation=dataset, callbacks=[Recorder()])
    history = trainer.train()
    assert calls == ["begin", 1, 2, history.records[0], 3, 4, history.records[1], "end"]
    assert len(history.eval_losses) == 2


@pytest.mark.parametrize(("strategy", "expected"), [("steps", [4, 8, 9]), ("epoch", [3, 6, 9]), ("no", [])])
def test_when_evaluations_happen(make_trainer, tokenizer, corpus, strategy, expected):
    data = LanguageModelingDataset(corpus[:1], tokenizer, max_length=8, pack_sequences=False)
    trainer = make_trainer(
        train=data,
        evaluation=data,
        batch_size=math.ceil(len(data) / 3),
        max_steps=None,
        num_epochs=3,
        eval_steps=4,
        eval_strategy=strategy,
    )
    assert [step for step, _ in trainer.train().eval_losses] == expected


def test_evaluation_weighs_tokens(make_trainer, tokenizer, corpus):
    texts = [text[: 9 + 5 * number] for number, text in enumerate(corpus[:7])]
    data = LanguageModelingDataset(texts, tokenizer, max_length=64, pack_sequences=False)
    trainer = make_trainer(evaluation=data, batch_size=3)
    losses = []
    for text in texts:
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
        log_probabilities = trainer.model.eval()(ids).logits.double().log_softmax(-1)
        losses += [-log_probabilities[0, t - 1, ids[0, t]].item() for t in range(1, ids.size(1))]
    mean = sum(losses) / len(losses)
    found = trainer.evaluate()
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(mean, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    loader = create_dataloader(data, batch_size=2, shuffle=False)
    assert compute_perplexity(trainer.model, loader, "cpu") == pytest.approx(math.exp(mean), rel=1e-5)
    # Every token but the first of each document is predicted here.
    expected = sum(losses) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(mean, data) == pytest.approx(expected)


def test_saved_model_and_tokenizer_come_back(make_trainer, dataset, tmp_path):
    trainer = make_trainer(evaluation=dataset)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = Trainer.from_pretrained(
        tmp_path / "model", config=trainer.config, eval_dataset=dataset, device="cpu", show_progress=False
    )
    assert loaded.evaluate() == trainer.evaluate()
    assert loaded.generate_text("def") == trainer.generate_text("def")
    assert loaded.generate_text("def").startswith("def")


def test_a_model_does_not_load_with_the_tokenizer_of_another_save(make_trainer, corpus, tmp_path):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = make_trainer()
    trainer.save_model(tmp_path / "model")
    other = BPETokenizer()
    other.train([text.swapcase()[::-1] for text in corpus], trainer.tokenizer.vocab_size)
    trainer.tokenizer = other
    trainer.model.save_pretrained = die
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(tmp_path / "model")
    with pytest.raises(FormatError, match=r"another tokenizer.*cut short"):
        Trainer.from_pretrained(tmp_path / "model", device="cpu")
    # A model that was saved alone has no tokenizer of its own.
    del trainer.model.save_pretrained
    trainer.model.save_pretrained(tmp_path / "alone")
    loaded = Trainer.from_pretrained(tmp_path / "alone", tmp_path / "model", device="cpu")
    assert loaded.tokenizer.vocab == other.vocab


def test_float16_becomes_bfloat16_on_a_cpu_and_says_so_once(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr("llm_trainer.training._precision._said", set())
    with caplog.at_level(logging.WARNING):
        first, _ = make_trainer(use_amp=True), make_trainer(use_amp=True)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "bfloat16 is used instead" in caplog.records[0].message
    with first._precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_progress_in_lines(make_trainer, dataset, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    trainer = make_trainer(evaluation=dataset, logging_steps=3)
    trainer._show_progress = True
    history = trainer.train()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"step 3/6  loss {history.records[0].train_loss:.4f}  ")
    assert lines[1].endswith(f"held-out loss {history.eval_losses[-1][1]:.4f}")
    assert all("tokens/s" in line and " MB" in line and "s to go" in line for line in lines)


def test_history_comes_back(make_trainer, dataset, tmp_path):
    trainer = make_trainer(evaluation=dataset, output_dir=tmp_path, logging_steps=2)
    history = trainer.train()
    path = tmp_path / "history.jsonl"
    assert TrainingHistory.load(path).records == history.records
    assert [record.step for record in history] == [2, 4, 6]
    content = path.read_text()
    path.write_text(content.replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatError, match="upgrade"):
        TrainingHistory.load(path)
    path.write_text(content[:-20])
    with pytest.raises(FormatError, match="damaged"):
        TrainingHistory.load(path)
    with pytest.raises(FormatError, match="does not exist"):
        TrainingHistory.load(tmp_path / "none")


def test_loss_curves(tmp_path):
    history = TrainingHistory()
    for step in range(1, 5):
        history.append(
            HistoryRecord(
                step=step,
                tokens=step,
                wall_s=1.0,
                tokens_per_s=1.0,
                train_loss=5.0 / step,
                eval_loss=6.0 / step if step % 2 == 0 else None,
                lr=0.1,
                grad_norm=1.0,
                skipped_steps=0,
            )
        )
    svg = loss_curve_svg(history)
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own output
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    lines = [
        path.get("d").count("L") + 1
        for group in root.iter("{http://www.w3.org/2000/svg}g")
        if (group.get("id") or "").startswith("line2d")
        for path in group.findall("{http://www.w3.org/2000/svg}path")
        if path.get("clip-path")
    ]
    assert 4 in lines
    assert 2 in lines
    assert loss_curve_svg(TrainingHistory()) != svg
    save_loss_curve(history, tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()
    save_loss_curve(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        save_loss_curve(history, tmp_path / "loss.gif")


def test_one_record_shows_as_a_point(make_trainer, tmp_path):
    history = make_trainer(max_steps=1).train()
    assert len(history.train_losses) == 1
    figure = _draw(history)
    with_line, without = io.BytesIO(), io.BytesIO()
    figure.axes[0].legend_.remove()
    figure.savefig(with_line, format="png")
    figure.axes[0].lines[0].set_visible(False)
    figure.savefig(without, format="png")
    assert with_line.getvalue() != without.getvalue()


def test_what_is_missing_is_said_before_the_work(make_trainer, tokenizer):
    with pytest.raises(TrainingError, match="give train_dataset"):
        make_trainer(train=None).train()
    with pytest.raises(TrainingError, match="has no rows"):
        make_trainer(train=[]).train()
    with pytest.raises(TrainingError, match="give eval_dataset"):
        make_trainer().evaluate()
    small = TransformerLM(ModelConfig(vocab_size=300, d_model=32, n_heads=2, n_layers=1, d_ff=32))
    with pytest.raises(TrainingError, match="320 tokens, the model only 300"):
        Trainer(small, tokenizer, TrainingConfig())


@pytest.mark.parametrize("role", ["train", "evaluation"])
def test_rows_of_any_dataset_are_looked_at_before_the_work(make_trainer, tokenizer, corpus, dataset, role):
    long = LanguageModelingDataset(corpus[:16], tokenizer, max_length=65)
    for rows in (Subset(long, [3, 4]), [long[0]], long):
        trainer = make_trainer(**{role: rows})
        with pytest.raises(ModelConfigurationError, match=r"Rows of 65 tokens .* max_length=64"):
            trainer.train()
    name = {"train": "training", "evaluation": "evaluation"}[role]
    with pytest.raises(TrainingError, match=f"The {name} dataset has no rows"):
        make_trainer(**{role: Subset(dataset, [])}).train()
    for row in ("text", {"input_ids": torch.zeros(4, dtype=torch.long)}):
        with pytest.raises(TrainingError, match=f"first row of the {name} dataset.*input_ids and labels"):
            make_trainer(**{role: [row]}).train()
    assert make_trainer(**{role: Subset(dataset, [0, 1])}, max_steps=1).train().records[-1].step == 1


def test_what_waits_for_evaluations_needs_them(make_trainer, dataset):
    for settings in ({"early_stopping_patience": 2}, {"eval_strategy": "epoch"}):
        with pytest.raises(ConfigurationError, match="nothing to evaluate on; give eval_dataset"):
            make_trainer(**settings).train()
    with pytest.raises(ConfigurationError, match="nothing to evaluate on"):
        make_trainer(callbacks=[EarlyStopping(1)]).train()
    with pytest.raises(ConfigurationError, match='eval_strategy is "no"'):
        make_trainer(evaluation=dataset, early_stopping_patience=2, eval_strategy="no").train()
    # The default asks for nothing.
    assert make_trainer(max_steps=1, eval_strategy="steps").train().records[-1].step == 1


@pytest.mark.parametrize("given", [{"batch_size": 4}, ModelConfig(), None, "adamw"], ids=str)
def test_a_trainer_without_a_training_config_is_refused(make_trainer, given):
    parts = make_trainer()
    with pytest.raises(ConfigurationError, match=f"config must be a TrainingConfig.*{type(given).__name__}"):
        Trainer(parts.model, parts.tokenizer, given)
    with pytest.raises(ConfigurationError, match=r"model must be a TransformerLM.*ModelConfig"):
        Trainer(parts.model.config, parts.tokenizer, parts.config)
    with pytest.raises(ConfigurationError, match=r"tokenizer must be a Tokenizer.*str"):
        Trainer(parts.model, "tokenizer", parts.config)


@pytest.fixture
def text(tmp_path, corpus):
    path = tmp_path / "text"
    path.mkdir()
    (path / "train.txt").write_text("".join(corpus[:48]))
    (path / "held_out.txt").write_text("".join(corpus[48:]))
    return path


def data_of(text, **settings):
    return DataConfig(
        train_file=str(text / "train.txt"), max_length=32, min_length=1, dataloader_num_workers=0, **settings
    )


def test_training_from_configurations_equals_training_on_their_rows(make_trainer, text, tokenizer, tmp_path):
    trainer = make_trainer(train=None, output_dir=tmp_path / "run", logging_steps=1, eval_steps=3)
    data = data_of(text, validation_file=str(text / "held_out.txt"))
    history = trainer.train_from_config(trainer.model.config, data)
    assert (len(history.train_losses), [step for step, _ in history.eval_losses]) == (6, [3, 6])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == data.to_dict()

    rows, held_out = (
        LanguageModelingDataset([(text / f"{name}.txt").read_text()], tokenizer, max_length=32)
        for name in ("train", "held_out")
    )
    direct = make_trainer(train=rows, evaluation=held_out, logging_steps=1, eval_steps=3)
    assert direct.train().train_losses == history.train_losses
    assert direct.history.eval_losses == history.eval_losses


def test_training_from_configurations_that_do_not_fit_is_refused_before_the_text_is_read(
    make_trainer, text, tmp_path
):
    trainer = make_trainer(train=None, output_dir=tmp_path / "run", early_stopping_patience=3)
    config, data = trainer.model.config, data_of(text)
    with pytest.raises(
        ModelConfigurationError, match="n_layers is 5, the model's 2; build the model with it"
    ):
        trainer.train_from_config(ModelConfig.from_dict(config.to_dict() | {"n_layers": 5}), data)
    long = DataConfig.from_dict(data.to_dict() | {"max_length": 65})
    with pytest.raises(ModelConfigurationError, match="Rows of 65 tokens"):
        trainer.train_from_config(config, long)
    for given, message in (
        ((config, {}), r"data_config must be a DataConfig.*dict.*DataConfig\.from_dict"),
        (({}, data), r"model_config must be a ModelConfig.*ModelConfig\.from_dict"),
        ((data, config), "model_config must be a ModelConfig, but is of type DataConfig"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            trainer.train_from_config(*given)
    with pytest.raises(ConfigurationError, match=r"nothing to evaluate on; .*validation_file"):
        trainer.train_from_config(config, data)
    assert not (tmp_path / "run").exists()
    missing = data_of(text, validation_file="missing.txt")
    with pytest.raises(DataError, match=r"missing\.txt does not exist"):
        trainer.train_from_config(config, missing)
