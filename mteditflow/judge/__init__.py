"""Judges as programs: the small VLM judge of the embedded world and how it is made."""
