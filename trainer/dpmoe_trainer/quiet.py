"""Keeps other people's code from talking: about private rows, or over the network.

Libraries quote what they choke on (a parser its row, a tokenizer a text's length), and their logs
end up where the owner of the data has no say. So nothing but this package's own words leaves the
process. To be called before any of them is imported.
"""

import logging
import os
import sys
import traceback
import warnings

from dpmoe_trainer.contract import TrainingPlan


def silence_libraries() -> None:
    """Turns off every logger, warning and progress bar; the trainer itself uses none of the three.

    The bar of the trainer's own steps does not obey the variable that is set here.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def keep_offline(plan: TrainingPlan) -> None:
    """Forbids the Hugging Face libraries any request, unless the plan itself names the hub."""
    names = [plan.model.hugging_face, *(block.data.hugging_face for block in plan.blocks)]
    names += [plan.evaluation.data.hugging_face] if plan.evaluation else []
    if not any(names):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def print_frames(error: BaseException) -> None:
    """Prints where an error arose: files and lines of code, never the error's own text."""
    traceback.print_tb(error.__traceback__, file=sys.stderr)
