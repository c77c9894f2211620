"""The report of a finished run: the final table, the plots and the page."""
