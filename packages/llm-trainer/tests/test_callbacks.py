import json
import math

import pytest
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.models import TransformerLM
from llm_trainer.training import HistoryRecord, Trainer
from llm_trainer.training.callbacks import Callback, EarlyStopping


@pytest.fixture
def make_trainer(tokenizer, corpus):
    data = LanguageModelingDataset(corpus[:8], tokenizer, max_length=24)
    other = LanguageModelingDataset(["9" * 60], tokenizer, max_length=24)

    def make(*callbacks, **settings):
        model = TransformerLM(
            ModelConfig(
                vocab_size=tokenizer.vocab_size, d_model=16, n_heads=2, n_layers=1, d_ff=32, max_seq_len=24
            )
        )
        defaults = {"batch_size": 4, "learning_rate": 0.05, "max_steps": 40, "use_amp": False}
        config = TrainingConfig(
            **(defaults | {"warmup_steps": 0, "eval_steps": 2, "checkpoint_dir": None} | settings)
        )
        return Trainer(
            model, tokenizer, config, data, other, callbacks, device="cpu", show_progress=False
        )  # fmt: skip

    return make


def evaluation(step: int, loss: float | None) -> HistoryRecord:
    return HistoryRecord(
        step=step,
        tokens=step,
        wall_s=1.0,
        tokens_per_s=1.0,
        train_loss=1.0,
        eval_loss=loss,
        lr=0.1,
        grad_norm=1.0,
        skipped_steps=0,
    )


def stops_at(callback: EarlyStopping, trainer: Trainer, losses: list[float | None]) -> int | None:
    """The position of the record after which the callback wants to stop."""
    trainer.should_stop = False
    for position, loss in enumerate(losses):
        callback.on_record(trainer, evaluation(position + 1, loss))
        if trainer.should_stop:
            return position
    return None


@pytest.mark.parametrize(
    ("patience", "threshold", "losses", "expected"),
    [
        (1, 0.0, [3.0, 2.0, 1.0], None),
        (1, 0.0, [3.0, 3.0], 1),
        (2, 0.0, [3.0, 3.1, 2.9, 3.0, 3.0], 4),
        # Records without an evaluation neither count nor forgive.
        (2, 0.0, [3.0, None, 3.1, None, 3.2], 4),
        # A gain of exactly the threshold is too small (numbers that are exact in binary).
        (2, 0.25, [3.0, 2.75, 2.8, 0.0], 2),
        (2, 0.25, [3.0, 2.74, 2.6, 2.4, 2.2], None),
        (2, 0.0, [math.nan, 1.0, math.nan, math.inf], 3),
        (2, 0.0, [math.nan, math.nan], 1),
    ],
)
def test_when_early_stopping_stops(make_trainer, patience, threshold, losses, expected):
    assert stops_at(EarlyStopping(patience, threshold), make_trainer(), losses) == expected


def test_a_resumed_run_goes_on_counting(make_trainer):
    losses = [3.0, 2.5, 2.6, 2.7, 2.8, 2.9]
    trainer = make_trainer()
    whole = stops_at(EarlyStopping(3), trainer, losses)
    for cut in range(5):
        before = EarlyStopping(3)
        assert stops_at(before, trainer, losses[:cut]) is None
        after = EarlyStopping(3)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        trainer.step = cut + 1
        after.on_train_begin(trainer)
        assert cut + stops_at(after, trainer, losses[cut:]) == whole


def test_a_run_ends_early_and_a_new_one_begins_anew(make_trainer):
    # The held-out text is unlike the training text, so its loss soon rises.
    callback = EarlyStopping(patience=2)
    trainer = make_trainer(callback, max_steps=400)
    for _ in range(2):
        history = trainer.train()
        losses = [loss for _, loss in history.eval_losses]
        assert history.records[-1].step < 400
        assert min(losses[-2:]) >= min(losses[:-2]) == callback.best_loss
        assert all(min(losses[i - 1 : i + 1]) < min(losses[: i - 1]) for i in range(2, len(losses) - 1))


def test_a_stopped_run_that_is_resumed_goes_on_only_with_more_patience(make_trainer):
    trainer = make_trainer()
    stopped = EarlyStopping(2)
    assert stops_at(stopped, trainer, [3.0, 3.1, 3.2]) == 2
    trainer.step = 3
    for patience, stops in ((2, True), (3, False)):
        callback = EarlyStopping(patience)
        callback.load_state_dict(stopped.state_dict())
        trainer.should_stop = False
        callback.on_train_begin(trainer)
        assert trainer.should_stop == stops


@pytest.mark.parametrize(
    ("patience", "threshold"), [(0, 0.0), (-1, 0.0), (1.5, 0.0), (True, 0.0), (1, -0.1), (1, math.nan)]
)
def test_impossible_limits(patience, threshold):
    with pytest.raises(ConfigurationError, match="must be a"):
        EarlyStopping(patience, threshold)


def test_a_callback_has_no_state_unless_it_says_so():
    assert Callback().state_dict() == {}
    Callback().load_state_dict({})
