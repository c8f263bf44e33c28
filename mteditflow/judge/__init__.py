"""Judges as programs: whether one can be used, how it is served, the small one of the embedded world."""
