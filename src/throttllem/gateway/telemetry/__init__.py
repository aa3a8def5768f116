"""Status, metrics and the dashboard."""
