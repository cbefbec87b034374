"""One module for each page of the wizard, the monitor, and the sheets over them."""
