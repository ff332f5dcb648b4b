"""The operators: schemas, checks, derivatives."""
