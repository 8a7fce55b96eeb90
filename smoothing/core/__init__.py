"""What every loss shares: options, arguments, the header that ranks compare, statistics, collectives."""
