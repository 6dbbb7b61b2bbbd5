"""The tables that a run reads, and the blocks that they belong to."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpmoe_trainer.contract.base import Contract, Name, PathString


class UnitPlan(Contract):
    """The privacy unit: one row, or all rows that share a value of `column`."""

    kind: Literal["example", "user"] = "example"
    column: Annotated[str, Field(max_length=253)] | None = None


class PartitionPlan(Contract):
    """Which rows of the file belong to the block: those whose `column` has one of `values`."""

    column: Name
    values: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]


class DataFormat(StrEnum):
    """File formats that `datasets` reads without running anybody's code."""

    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class DataPlan(Contract):
    """One table of text, as the trainer finds it; without a label column, a language's text.

    Attributes:
        text_column: the column of text; or else
        tokens_column: the column of the text's token ids, a list of integers in each row.
    """

    path: PathString | None = None
    hugging_face: Name | None = None
    revision: Name | None = None
    split: Name | None = None
    format: DataFormat | None = None
    text_column: Name | None = None
    tokens_column: Name | None = None
    label_column: Name | None = None
    partition: PartitionPlan | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hugging_face is None):
            raise ValueError("exactly one of path and huggingFace must be set")
        if self.path is not None and self.format is None:
            raise ValueError("format must be set where path is")
        return self

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if (self.text_column is None) == (self.tokens_column is None):
            raise ValueError("exactly one of textColumn and tokensColumn must be set")
        if self.tokens_column is not None and self.format in (DataFormat.CSV, DataFormat.TSV):
            raise ValueError(
                f"format must be jsonl or parquet where tokensColumn is set, {self.format} has no "
                f"lists"
            )
        return self


class BlockPlan(Contract):
    """One block that the job trains on. `units` is the owner's public count of privacy units."""

    namespace: Name
    name: Name
    account: PathString
    units: Annotated[int, Field(ge=1)]
    unit: UnitPlan
    data: DataPlan
