"""How far the program is, and where one looks: bars, the time that is left, boards for curves and pictures."""
