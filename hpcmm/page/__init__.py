"""From tables to something to look at: the terminal, Markdown and one self-contained HTML page."""
