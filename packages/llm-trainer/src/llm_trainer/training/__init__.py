"""Training a model."""

from llm_trainer.training._history import HistoryRecord, TrainingHistory
from llm_trainer.training._trainer import Trainer
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.optimizer import create_optimizer
from llm_trainer.training.plots import loss_curve_svg, save_loss_curve
from llm_trainer.training.scheduler import create_scheduler
from llm_trainer.training.utils import get_device, set_seed

__all__ = [
    "Callback",
    "HistoryRecord",
    "Trainer",
    "TrainingHistory",
    "create_optimizer",
    "create_scheduler",
    "get_device",
    "loss_curve_svg",
    "save_loss_curve",
    "set_seed",
]
