"""The engine: symbols, operators, models, tapes and their derivatives."""
