"""Files that run as scripts in an engine's own Python: their names shadow no module there."""
