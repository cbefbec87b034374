"""One widget a module; all draw by the line API and repaint only what changed."""
