"""Parts that the live sources share."""
