"""What an arena found: judged, as text, as a page."""
