"""Before anything is rented: does a run fit a slice, how fast could it be, what must the input supply."""
