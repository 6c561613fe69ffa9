"""From visual features and prompt ids to generated ids, compiled."""
