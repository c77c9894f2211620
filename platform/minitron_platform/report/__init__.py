"""The table, the plots and the page that a run ends with."""
