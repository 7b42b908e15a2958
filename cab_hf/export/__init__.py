"""Students as models that run without this package."""
