"""Networks and properties in the formats that other people's verifiers read."""
