"""Pictures and pages of what is stored."""
