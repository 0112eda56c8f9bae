"""The fixtures that several files here share."""

from tests.unit.registry_fixtures import (
    acme,
    cheap_hashing,
    clock,
    empty_registry,
    registry,
    registry_engines,
    registry_settings,
    registry_url,
)

__all__ = ["acme", "cheap_hashing", "clock", "empty_registry", "registry", "registry_engines", "registry_settings", "registry_url"]
