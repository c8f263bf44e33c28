"""Pure functions: transitions -> loss and diagnostics."""
