"""Conversion of models, training of what was converted, analysis and comparison."""

from bitmodels.utils._analysis import analyze_model
from bitmodels.utils._comparison import compare_models
from bitmodels.utils._conversion import ConversionWarning, convert_pytorch_model, replace_linear_layers
from bitmodels.utils._finetuning import finetune

__all__ = [
    "ConversionWarning",
    "analyze_model",
    "compare_models",
    "convert_pytorch_model",
    "finetune",
    "replace_linear_layers",
]
