"""Text for people."""


def printable(text: str) -> str:
    """Text without what no terminal can show: halves of characters, as broken data and file names hold them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
