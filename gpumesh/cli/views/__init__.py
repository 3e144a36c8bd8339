"""What is drawn on a terminal: tables, bars, the live table. No command is decided here, and no host is asked."""
