"""The method: what to practise, when to stop, what to learn from. Pure Python, numpy and SQLite; imports no model."""
