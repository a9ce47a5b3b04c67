"""Export: the rows of a finished run as a trainer reads them, and as a data set of the hub."""
