"""Exchange of weights with other code bases: tables of names, read in both directions."""
