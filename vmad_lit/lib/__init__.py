"""The library of operators."""
