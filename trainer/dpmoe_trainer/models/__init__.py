"""Models: loading without trust, sparse upcycling, and the choice of what is trained.

Importing this package registers `DPMoEBertForSequenceClassification` with transformers.
"""

from dpmoe_trainer.models.bert_moe import DPMoEBertConfig, DPMoEBertForSequenceClassification
from dpmoe_trainer.models.checkpoint import UnusableModel
from dpmoe_trainer.models.load import load_model, load_tokenizer
from dpmoe_trainer.models.trainable import select_trainable
from dpmoe_trainer.models.upcycle import upcycle

__all__ = [
    "DPMoEBertConfig",
    "DPMoEBertForSequenceClassification",
    "UnusableModel",
    "load_model",
    "load_tokenizer",
    "select_trainable",
    "upcycle",
]
