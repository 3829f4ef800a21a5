"""An input size in what pydantic checks; a module of its own, since `--help` does not wait for pydantic."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, WithJsonSchema

from paretoprune.base.image_size import ImageSize, parse_size, plain_size, read_size

StoredSize = Annotated[
    ImageSize,
    PlainValidator(read_size),
    PlainSerializer(plain_size),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "prefixItems": [{"type": "integer"}] * 2}]}),
]
"""As JSON holds it."""
GivenSize = Annotated[StoredSize, BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)]
"""As people write it: also ``384,640``."""
