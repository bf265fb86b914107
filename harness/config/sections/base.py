"""What all parts of a configuration have in common: nothing unknown, nothing that changes, numbers that are numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The defaults of its keys, as plain containers; a key without one is left out."""
        stated = {key: field.get_default(call_default_factory=True) for key, field in cls.model_fields.items() if not field.is_required()}
        return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in stated.items()}

    @classmethod
    def parts(cls) -> dict[str, type[Strict]]:
        """The keys that hold keys of their own, and the class of each."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Strict)}


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


NUMBER = BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)  # true is none
Whole = Annotated[int, NUMBER, Field(le=2**32 - 1)]  # the largest seed that numpy takes; nothing that is counted comes near
Real = Annotated[float, NUMBER, Field(allow_inf_nan=False)]
Uris = Annotated[list[str], BeforeValidator(as_list)]
Folders = Annotated[list[str], BeforeValidator(lambda value: [] if value is None else as_list(value))]
Texts = Folders
