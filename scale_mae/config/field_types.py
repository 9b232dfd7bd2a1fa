"""Types of config values, the base class of all sections, and the mark of keys that may change when a run resumes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A section of the configuration. It is immutable and accepts declared keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


CHANGEABLE: dict[str, Any] = {"may_change_on_resume": True}  # `json_schema_extra` of such a key


def may_change_on_resume(field: FieldInfo) -> bool:
    """Whether a resumed run may have another value of this key, because it does not change what the run computes."""
    return isinstance(field.json_schema_extra, dict) and CHANGEABLE.items() <= field.json_schema_extra.items()


def _two_sides(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _check_randaugment(policy: str | None) -> str | None:
    # timm ignores some of the parts that it does not know, so check all of them here
    if policy and not re.fullmatch(rf"rand(-({RANDAUGMENT}))*", policy):
        raise ValueError(
            f"data.randaugment={policy}: not a RandAugment policy of timm. Write rand followed by any of -m9 (magnitude), "
            "-n2 (operations per image), -p0.5 (probability of each), -mstd0.5 (standard deviation of the magnitude), "
            "-mmax10 (largest magnitude), -inc1, -tweights, -t3a and -t3aw."
        )
    return policy


DURATION = r"^\d+(\.\d+)?(e\d{1,2})? (steps|epochs|images)$"
RANDAUGMENT = r"(m|mmax)\d+|n[1-9]|p(0|1|0?\.\d+|1\.0+)|mstd\d+(\.\d+)?|inc[01]|t(weights|3a|3aw)"

Side = Annotated[int, Field(gt=0)]
Pixels = Annotated[tuple[Side, Side], BeforeValidator(_two_sides, json_schema_input_type=int | tuple[int, int])]
NonNegative = Annotated[float, Field(ge=0)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
OptionalText = Annotated[str | None, BeforeValidator(lambda text: text or None)]
RandAugment = Annotated[OptionalText, AfterValidator(_check_randaugment)]
Duration = Annotated[str, BeforeValidator(str, json_schema_input_type=str), Field(pattern=DURATION)]
