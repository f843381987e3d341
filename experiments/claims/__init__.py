"""The paper's tables and figures, computed again: one file a subject, each a list of claims."""
