"""Training a model."""

from llm_trainer.training._history import HistoryRecord, TrainingHistory
from llm_trainer.training._trainer import Trainer
from llm_trainer.training.callbacks import Callback, EarlyStopping
from llm_trainer.training.optimizer import create_optimizer
from llm_trainer.training.plots import loss_curve_svg, save_loss_curve, save_run_report
from llm_trainer.training.scheduler import create_scheduler
from llm_trainer.training.utils import (
    get_device,
    get_memory_usage,
    load_checkpoint,
    save_checkpoint,
    set_seed,
    setup_logging,
)

__all__ = [
    "Callback",
    "EarlyStopping",
    "HistoryRecord",
    "Trainer",
    "TrainingHistory",
    "create_optimizer",
    "create_scheduler",
    "get_device",
    "get_memory_usage",
    "load_checkpoint",
    "loss_curve_svg",
    "save_checkpoint",
    "save_loss_curve",
    "save_run_report",
    "set_seed",
    "setup_logging",
]
