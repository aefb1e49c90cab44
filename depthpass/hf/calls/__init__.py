"""One call of a transformed model: doors, arguments, positions and packed rows, the run of the program, what comes out."""
