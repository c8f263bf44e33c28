"""What a library says, in one line of ours."""


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something, without its last stop; its type where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":.") if lines else type(error).__name__
