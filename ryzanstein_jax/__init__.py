"""LLM inference in JAX on many devices. Importing this package does not import JAX."""
