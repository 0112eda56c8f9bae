"""Applications that show how tenantdb is used. Not part of the package."""
