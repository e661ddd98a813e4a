"""Diagnosis of a machine: what an engine needs, whether it is here, and what to do about it where it is not."""
