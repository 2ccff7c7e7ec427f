"""How a benchmark measures: the race, the machine under it, memory, and the libraries it is compared with."""
